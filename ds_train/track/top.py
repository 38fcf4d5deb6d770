"""`ds-train top`: a running job in a terminal, from its metrics.jsonl alone; rows of a terminal over ssh will do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ds_train.track.chart import duration, text_of
from ds_train.track.phases import PHASES
from ds_train.track.runs import Floats, Run, details, number, read_run

_BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT = 50
_EVENTS = 6
_COLORS = {
    "data": "yellow", "forward": "bright_blue", "backward": "blue", "collectives": "red", "pipeline": "magenta",
    "optimizer": "green", "other": "bright_black", "save": "cyan",
}  # fmt: skip
_ENDS = {"stop": "stopped", "fault": "failed", "stopped": "failed", "stopped-early": "finished early"}
_GOES_ON = ("resume", "restart")
_QUIET_AFTER_STEPS = 10
_TAIL_BYTES = 4 * 2**20
"""What is read of the file: thousands of records, in a tenth of a second."""


def show_once(path: Path) -> None:
    """Print how the run stands.

    Raises:
        UserError: there is no run, or no step of it yet.
    """
    run = read_run(path, _TAIL_BYTES)
    Console().print(view(run, time.time(), Console().width))


def watch(path: Path, every_s: float) -> None:
    """Show how the run stands until Ctrl-C; the file is read again when it has grown. Once, where there is no terminal.

    Raises:
        UserError: as `show_once`.
    """
    console = Console()
    if not console.is_terminal:
        show_once(path)
        return
    run, seen = read_run(path, _TAIL_BYTES), _size(path)
    with Live(view(run, time.time(), console.width), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)
                if _size(path) != seen:
                    seen, run = _size(path), read_run(path, _TAIL_BYTES)
                live.update(view(run, time.time(), console.width), refresh=True)
        except KeyboardInterrupt:
            pass


def view(run: Run, now: float, width: int) -> RenderableType:
    """What is shown of `run` at the time `now` (seconds of the epoch), `width` characters wide."""
    return Group(_head(run, now, width), Text(), _figures(run, width), Text(), _phases(run, width), *_events(run))


def sparkline(values: Floats, width: int) -> str:
    """`values` as `width` blocks from the lowest to the highest; each the highest of its share: spikes stay."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return ""
    parts = [part.max() for part in np.array_split(values, min(width, len(values)))]
    low, spread = min(parts), (max(parts) - min(parts)) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * (part - low) / spread))] for part in parts)


def state(run: Run, now: float) -> tuple[str, float | None]:
    """("running", "silent for 3:20", "finished", "stopped" ..., seconds that are left where they can be told)."""
    done, total = run.last["step"], run.steps
    step_s = _step_seconds(run)
    if total is not None and done >= total:
        return "finished", None
    ended = _ended(run)
    if ended is not None:
        return ended, None
    left = step_s * (total - done) if total is not None and math.isfinite(step_s) else None
    times = [number(record.get("time")) for record in (run.last, *run.evals[-1:], *run.events[-1:])]
    last = max((value for value in times if math.isfinite(value)), default=math.nan)
    silence = now - last
    # A step, an evaluation or a save may take its time; nothing for ten steps and a minute is worth a word.
    if silence > max(60.0, _QUIET_AFTER_STEPS * step_s):
        return f"silent for {duration(silence)}", left
    return "running", left


def _ended(run: Run) -> str | None:
    """How the run has ended before its last step, where it says so itself."""
    word = None
    for event in run.events:
        if event["kind"] in _GOES_ON:
            word = None
        elif event["kind"] in _ENDS and number(event.get("time")) >= number(run.last.get("time")):
            word = _ENDS[event["kind"]]
    return word


def _head(run: Run, now: float, width: int) -> RenderableType:
    word, left = state(run, now)
    done, total = run.last["step"], run.steps
    color = {"running": "green", "finished": "cyan", "finished early": "cyan", "failed": "red"}.get(word, "yellow")
    name = Text(run.name, "bold")
    name.truncate(max(8, width - len(word) - 2), overflow="ellipsis")
    title = Text.assemble(name, "  ", (word, color))
    eta = f"{duration(left)} left" if left is not None else ""
    steps = f"step {done:,} of {total:,}" if total is not None else f"step {done:,}"
    far = Text(f"{steps}   {eta}".rstrip())
    room = width - title.cell_len - far.cell_len
    lines: list[RenderableType] = [title.append(" " * room).append(far)] if room > 0 else [title, far]
    return Group(*lines, *([] if total is None else [ProgressBar(total=total, completed=done, width=width)]))


def _figures(run: Run, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(justify="right" if _ else "left", no_wrap=True)
    table.add_column(no_wrap=True)
    room = max(10, width - 42)
    held_out = run.column("loss", "evals")
    rows: Sequence[tuple[str, str, Floats]] = [
        ("loss", f"{number(run.last.get('loss')):.4f}", run.column("loss")),
        ("held-out loss", f"{held_out[-1]:.4f}" if len(held_out) else "–", held_out),
        ("learning rate", f"{number(run.last.get('lr')):.3g}", run.column("lr")),
        ("gradient norm", f"{number(run.last.get('grad_norm')):.3g}", run.column("grad_norm")),
        ("tokens/s", text_of(_recent(run, "tokens_per_second")), run.column("tokens_per_second")),
        ("MFU", f"{100 * _recent(run, 'mfu'):.1f} %", run.column("mfu")),
        ("step", text_of(1e3 * _step_seconds(run), "ms"), run.column("step_ms")),
        ("peak memory", text_of(_recent(run, "memory_peak_mb"), "MB"), run.column("memory_peak_mb")),
        ("tokens", text_of(number(run.last.get("tokens"))), np.zeros(0)),
    ]
    for name, value, values in rows:
        table.add_row(Text(name, "bright_black"), Text(value, "bold"), Text(sparkline(values, room), "blue"))
    return table


def _phases(run: Run, width: int) -> RenderableType:
    """The recent mean of a step's phases as one bar with its legend."""
    spent = {phase: _recent(run, f"{phase}_ms") for phase in (*PHASES, "save")}
    spent = {phase: ms for phase, ms in spent.items() if math.isfinite(ms) and ms > 0}
    total = sum(spent.values())
    if not total:
        return Text()
    bar, lines, filled = Text(), [Text()], 0.0
    for index, (phase, ms) in enumerate(spent.items()):
        # Neighbours can be told apart without colours, too.
        mark = "█▒"[index % 2]
        start, filled = filled, filled + ms / total * width
        bar.append(mark * (round(filled) - round(start)), _COLORS[phase])
        entry = f"{phase} {100 * ms / total:.0f} %"
        if len(lines[-1]) + len(entry) + 2 > width:
            lines.append(Text())
        gap = "   "[: max(0, width - len(lines[-1]) - len(entry) - 2)]
        lines[-1].append(f"{mark} ", _COLORS[phase]).append(entry + gap)
    return Group(bar, *lines)


def _events(run: Run) -> list[RenderableType]:
    if not run.events:
        return []
    table = Table.grid(padding=(0, 2))
    for event in run.events[-_EVENTS:]:
        text = Text(details(event), "bright_black", no_wrap=True, overflow="ellipsis")
        table.add_row(Text(f"{event.get('step', '')}"), Text(event["kind"], "yellow"), text)
    return [Text(), table]


def _recent(run: Run, key: str) -> float:
    values = run.column(key)[-_RECENT:]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _step_seconds(run: Run) -> float:
    """Of a step, with the saves after it."""
    step, save = _recent(run, "step_ms"), float(np.nan_to_num(run.column("save_ms")[-_RECENT:], posinf=0.0).mean())
    return (step + save) / 1e3 if math.isfinite(step) else _recent(run, "seconds")


def _size(path: Path) -> Any:
    file = path if path.is_file() else path / "metrics.jsonl"
    found = file.stat()
    return found.st_size, found.st_mtime_ns
