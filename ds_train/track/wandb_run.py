"""Weights & Biases: one run for the whole job, from rank 0, over tokens, grouped by what is measured.

Its workspace makes a section of every group of names (train/, eval/, speed/ ...), so nobody has to arrange it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ds_train.config import RunConfig
from ds_train.errors import UserError
from ds_train.track.metrics import read_metrics
from ds_train.track.named import GROUPS, named

_BEST = {"train/loss": "min", "eval/loss": "min", "eval/perplexity": "min", "eval/accuracy": "max", "speed/mfu": "max"}
"""What the table of runs shows besides the last value."""


class WandbRun:
    """A wandb run. Its methods raise what wandb raises; the tracker ends it then."""

    def __init__(
        self, run: Any, artifacts: Literal["off", "export", "all"], name: str, place: str, given_up: int
    ) -> None:
        """`given_up` are the steps that the run's roll-backs have given up so far."""
        self._run, self._artifacts, self._name, self._given_up = run, artifacts, name, given_up
        self.place = place
        """Where to look at the run: its address, or what uploads it."""
        self._samples: list[list[Any]] = []
        self._groups: set[str] = set()
        run.define_metric("tokens", hidden=True)
        for metric, best in _BEST.items():
            run.define_metric(metric, step_metric="tokens", summary=f"{best},last")
        self._define(GROUPS)

    @staticmethod
    def start(recipe: RunConfig, plan: Mapping[str, Any], folder: Path, resume_id: str | None) -> WandbRun:
        """Start or continue (`resume_id`) the run."""
        import wandb

        track = recipe.track
        run = wandb.init(
            mode="disabled" if track.wandb == "off" else track.wandb,
            project=track.wandb_project,
            entity=track.wandb_entity,
            name=recipe.name,
            tags=list(track.tags),
            id=resume_id,
            resume="allow" if resume_id else None,
            dir=str(folder),
            config={"recipe": recipe.model_dump(mode="json"), "plan": dict(plan)},
            settings=wandb.Settings(silent=True),
        )
        online = track.wandb == "online"  # wandb warns whoever asks an offline run for its address
        place = str(run.url) if online else f"wandb sync {Path(run.dir).parent}"
        given_up = 0
        if resume_id:
            files = (folder / "metrics.jsonl", folder / "rolled-back.jsonl")
            given_up = sum(_given_up(record) for file in files for record in read_metrics(file))
        return WandbRun(run, track.wandb_artifacts, recipe.name, place, given_up)

    @property
    def id(self) -> str:
        """Id under which the run continues after a resume."""
        return str(self._run.id)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log a record at `step`; texts of a sample as a row of a table."""
        found: dict[str, Any] = dict(named(record))
        self._define({name.partition("/")[0] for name in found})
        if record["kind"] == "sample":
            found["eval/samples"] = self._table(record, step)
        if "tokens" in record:
            found["tokens"] = record["tokens"]
        # wandb ignores a step that isn't higher than the last one: after a roll-back its own step counts on.
        self._given_up += _given_up(record)
        self._run.log(found, step=step + self._given_up)

    def go_back(self, step: int) -> None:
        """What is logged stays: curves over tokens show both ways."""

    def keep(self, path: Path, kind: str, step: int) -> None:
        """Log a folder as an artifact where the recipe wants its kind; versions of one name follow one another."""
        if self._artifacts == "off" or (kind != "export" and self._artifacts != "all"):
            return
        import wandb

        artifact = wandb.Artifact(f"{self._name}-{kind}", type="model", metadata={"step": step})
        artifact.add_dir(str(path))
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def finish(self, folder: Path, exit_code: int) -> None:
        """Log the run's report and end the run, failed if `exit_code` isn't 0. An offline file is whole then."""
        try:
            self._log_report(folder)
        finally:
            self._run.finish(exit_code=exit_code)

    def _log_report(self, folder: Path) -> None:
        import wandb

        from ds_train.track.report import page, write_pngs
        from ds_train.track.runs import read_run

        try:
            run = read_run(folder)
        except UserError:  # it ended before its first step
            return
        with tempfile.TemporaryDirectory() as scratch:
            pictures = write_pngs([run], Path(scratch))
            shown: dict[str, Any] = {f"report/{path.stem}": wandb.Image(str(path)) for path in pictures}
            self._run.log({"report/page": wandb.Html(page([run])), **shown})

    def _table(self, record: Mapping[str, Any], step: int) -> Any:
        import wandb

        self._samples.append([record.get("step", step), record.get("prompt", ""), record.get("text", "")])
        return wandb.Table(columns=["step", "prompt", "text"], data=self._samples)

    def _define(self, groups: Any) -> None:
        for group in groups:
            if group not in self._groups:
                self._groups.add(group)
                self._run.define_metric(f"{group}/*", step_metric="tokens")


def _given_up(record: Mapping[str, Any]) -> int:
    """Steps that are trained again after this record."""
    return int(record["spike_step"] - record["step"]) if record.get("event") == "roll-back" else 0
