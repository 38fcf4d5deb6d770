"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_LINE_EVERY_S = 5.0
_LINE_AT_LEAST_EVERY_S = 60.0
_BESIDE_WORDS = 30
"""Columns of a terminal that the bar takes at least, with the time that is left, but without the numbers of steps."""


class _Screen(Console):
    """Goes quiet where nobody reads along any more, a pipe or a terminal that is closed, instead of ending the run."""

    def on_broken_pipe(self) -> None:
        """What is printed from now on goes nowhere."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class StepDisplay:
    """Shows training records. `bar`: True draws a bar, False prints lines, "auto" asks whether this is a terminal."""

    def __init__(
        self, total_steps: int, done: int, bar: bool | Literal["auto"], console: Console | None = None
    ) -> None:
        # Lines are never wrapped: people pipe them into files and grep.
        self._console = console or _Screen(soft_wrap=True, highlight=False)
        self._total = total_steps
        self._done_before, self._next_line_s = done, time.monotonic()
        self._started_s: float | None = None
        self._bar: Progress | None = None
        if bar is True or (bar == "auto" and self._console.is_terminal):
            counts = MofNCompleteColumn(table_column=Column(no_wrap=True))
            left = TimeRemainingColumn(table_column=Column(no_wrap=True))
            columns = (TextColumn("step"), counts, BarColumn(), TextColumn("{task.fields[text]}"), left)
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=done, text="")
            self._bar.start()

    def show(self, record: Mapping[str, Any], step: int) -> None:
        """Show a metrics record of kind train or eval; other kinds come with a note."""
        if record["kind"] == "eval":
            scores = "  ".join(f"{name} {record[name]:.4f}" for name in ("loss", "perplexity", "accuracy"))
            self.note(f"step {step:>6}  held out: {scores}")
            return
        if record["kind"] != "train":
            return
        if self._bar is not None:
            room = self._console.width - _BESIDE_WORDS - 2 * len(str(self._total))
            self._bar.update(self._task, completed=step, text=_fitting(_words(record), room))
            return
        now = time.monotonic()
        if self._started_s is None:
            # What came before the first step, data, weights, wandb, is no part of the others.
            self._started_s = now - (step - self._done_before) * record["step_ms"] / 1e3
        if step == self._total or now >= self._next_line_s:
            # A day's log should be pages, not books: a line per hundredth of the time so far, within bounds.
            elapsed = now - self._started_s
            self._next_line_s = now + min(_LINE_AT_LEAST_EVERY_S, max(_LINE_EVERY_S, elapsed / 100))
            left = elapsed / max(1, step - self._done_before) * (self._total - step)
            self.note(f"step {step:>6}/{self._total}  {_words(record)}  {timedelta(seconds=round(left))} left")

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        try:
            self._console.print(text, markup=False, highlight=False)
        except OSError:
            self._console.on_broken_pipe()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


def _fitting(words: str, room: int) -> str:
    """As many of `words`, which have two spaces between them, as there is room for: step and time go before them."""
    parts = words.split("  ")
    lengths = itertools.accumulate(len(part) + 2 for part in parts)
    return "  ".join(part for part, length in zip(parts, lengths, strict=True) if length - 2 <= room)


def _words(record: Mapping[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}  {record['memory_mb']:,.0f} MB"
    )
