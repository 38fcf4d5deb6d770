"""Everything that a run reports, in one object: metrics.jsonl, the screen, and where else the recipe wants it.

Only rank 0 reports. What goes wrong in a report is said once, ends that report, and never stops training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ds_train.config import RunConfig
from ds_train.errors import first_line
from ds_train.track.metrics import MetricsFile
from ds_train.track.progress import StepDisplay
from ds_train.track.tables import Tables
from ds_train.track.wandb_run import WandbRun


class Report(Protocol):
    """One more place for a run's records. Its methods may raise whatever they like."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """A record, which has a `kind`."""

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: records of later steps will come again."""

    def finish(self, folder: Path, exit_code: int) -> None:
        """The run in `folder` has ended, well where `exit_code` is 0."""


class Tracker:
    """Reports of one run; does nothing on other ranks than 0."""

    def __init__(
        self,
        run: RunConfig,
        plan: Mapping[str, Any],
        folder: Path,
        is_main: bool,
        total_steps: int,
        done: int,
        wandb_id: str | None,
    ) -> None:
        self._folder = folder
        self._display: StepDisplay | None = None
        self._metrics: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        self._reports: dict[str, Report] = {}
        if not is_main:
            return
        self._display = StepDisplay(total_steps, done, run.track.progress)
        self._metrics = MetricsFile(folder / "metrics.jsonl", self.note)
        self._metrics.truncate_after(done)
        if run.track.wandb != "off":
            self._start("wandb", lambda: WandbRun.start(run, plan, folder, wandb_id))
        if "tensorboard" in run.track.also:
            self._start("tensorboard", lambda: _tensorboard(folder, done))
        if "csv" in run.track.also:
            self._start("csv", lambda: Tables(folder / "csv", done))
        found = self._reports.get("wandb")
        if isinstance(found, WandbRun):
            self._wandb = found
            self.note(f"wandb: {found.place}")

    @property
    def wandb_id(self) -> str | None:
        """Id of the wandb run, for the checkpoint; None where there is none, or it has failed."""
        return self._wandb.id if self._wandb is not None and "wandb" in self._reports else None

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Report a record, which has a `kind`: train, eval, sample, or any event's."""
        if self._display is None or self._metrics is None:
            return
        record = {**record, "time": round(time.time(), 3)}
        self._metrics.write(record)
        self._display.show(record, step)
        self._each(lambda report: report.log(record, step))

    def keep(self, path: Path, kind: str, step: int) -> None:
        """Offer a folder that has just become whole, of `kind` checkpoint or export, to wandb's artifacts."""
        if self._wandb is not None and "wandb" in self._reports:
            found = self._wandb
            self._try("wandb", lambda: found.keep(path, kind, step))

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: metrics of later steps will be written again; these go to rolled-back.jsonl."""
        if self._metrics is not None:
            self._metrics.truncate_after(step, "rolled-back.jsonl")
        self._each(lambda report: report.go_back(step))

    def note(self, text: str) -> None:
        """Say something that is no metric."""
        if self._display is not None:
            self._display.note(text)

    def close(self, exit_code: int) -> None:
        """End all reports; `exit_code` 0 means that the run came to its end."""
        self._each(lambda report: report.finish(self._folder, exit_code))
        self._reports.clear()
        if self._display is not None:
            self._display.close()

    def _start(self, name: str, make: Callable[[], Report]) -> None:
        try:
            self._reports[name] = make()
        except Exception as error:  # network, login, disk: libraries raise many kinds
            self.note(f"{name} is off: {first_line(error)}; training goes on")

    def _each(self, action: Callable[[Report], None]) -> None:
        for name, report in list(self._reports.items()):
            self._try(name, lambda report=report: action(report))  # type: ignore[misc]

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # as in `_start`
            self.note(f"{name} is off from here: {first_line(error)}; training goes on")
            self._reports.pop(name, None)


def _tensorboard(folder: Path, done: int) -> Report:
    from ds_train.track.tensorboard import TensorBoard

    return TensorBoard(folder / "tensorboard", done)
