"""RUN/tensorboard: the same numbers as scalars over steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ds_train.track.named import named


class TensorBoard:
    """Scalars by name over steps, samples as text."""

    def __init__(self, folder: Path, done: int) -> None:
        """What an earlier part of this run wrote after step `done` is hidden."""
        self._folder = folder
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write a record's numbers at `step`."""
        for name, value in named(record).items():
            self._writer.add_scalar(name, value, step, walltime=record.get("time"))
        if record["kind"] == "sample":
            self._writer.add_text("sample", f"**{record.get('prompt', '')}**{record.get('text', '')}", step)

    def go_back(self, step: int) -> None:
        """Hide what was written after `step`."""
        self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def finish(self, folder: Path, exit_code: int) -> None:
        """Write what is left."""
        self._writer.close()
