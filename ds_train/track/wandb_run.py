"""Weights & Biases: one run for the whole job, from rank 0. Its failures are said once and never stop training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.errors import first_line

_HIDDEN = {"kind", "step"}


class WandbRun:
    """A wandb run with tokens as the x axis and records grouped by kind: train/loss, eval/loss."""

    def __init__(self, run: Any, warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn

    @staticmethod
    def start(
        recipe: RunConfig, plan: Mapping[str, Any], folder: Path, resume_id: str | None, warn: Callable[[str], None]
    ) -> WandbRun | None:
        """Start or continue (`resume_id`) the run; None where wandb is off or fails to start."""
        track = recipe.track
        if track.wandb == "off":
            return None
        try:
            import wandb

            run = wandb.init(
                mode=track.wandb,
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
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
        except Exception as error:  # network, login, disk: wandb raises many kinds
            warn(f"wandb is off: {first_line(error)}; training goes on")
            return None
        return WandbRun(run, warn)

    @property
    def id(self) -> str | None:
        """Id under which the run continues after a resume."""
        return None if self._run is None else str(self._run.id)

    @property
    def place(self) -> str:
        """Where to look at the run: its address, or the folder to upload."""
        if self._run is None:
            return ""
        return str(self._run.url or f"wandb sync {Path(self._run.dir).parent}")

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log a metrics record at `step`."""
        group = record.get("kind", "train")
        named = {f"{group}/{key}": value for key, value in record.items() if key not in _HIDDEN and key != "tokens"}
        self._try(lambda run: run.log({**named, "tokens": record.get("tokens", 0)}, step=step))

    def finish(self, exit_code: int) -> None:
        """End the run; wandb marks it failed if `exit_code` isn't 0. An offline file is whole when the process ends."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # see `start`
            self._warn(f"wandb is off from here: {first_line(error)}; training goes on")
            self._run = None
