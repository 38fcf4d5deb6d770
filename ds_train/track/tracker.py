"""Everything that a run reports, in one object: metrics.jsonl, wandb, the screen. Only rank 0 reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.track.metrics import MetricsFile
from ds_train.track.progress import StepDisplay
from ds_train.track.wandb_run import WandbRun


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
        self._display: StepDisplay | None = None
        self._metrics: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        if is_main:
            self._display = StepDisplay(total_steps, done, run.track.progress)
            self._metrics = MetricsFile(folder / "metrics.jsonl", self.note)
            self._metrics.truncate_after(done)
            self._wandb = WandbRun.start(run, plan, folder, wandb_id, self.note)
            if self._wandb is not None:
                self.note(f"wandb: {self._wandb.place}")

    @property
    def wandb_id(self) -> str | None:
        """Id of the wandb run, for the checkpoint; None where there is none."""
        return self._wandb.id if self._wandb is not None else None

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Report a record, which has a `kind` (train or eval)."""
        if self._display is not None and self._metrics is not None:
            record = {**record, "time": round(time.time(), 3)}
            self._metrics.write(record)
            self._display.show(record, step)
            if self._wandb is not None:
                self._wandb.log(record, step)

    def note(self, text: str) -> None:
        """Say something that is no metric."""
        if self._display is not None:
            self._display.note(text)

    def close(self, exit_code: int) -> None:
        """End all reports; `exit_code` 0 means that the run came to its end."""
        if self._wandb is not None:
            self._wandb.finish(exit_code)
        if self._display is not None:
            self._display.close()
