"""Curves as a PNG file, and as a sketch of characters for a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_train.errors import user_error

_BLOCKS = " ▁▂▃▄▅▆▇█"


def sketch(name: str, values: Sequence[float], width: int = 72, height: int = 6) -> list[str]:
    """`values`, evenly spaced, as lines of a bar chart from 0 (or the lowest, if negative) to the highest."""
    high, low = max(values), min(0.0, *values)
    spread = high - low or 1.0
    columns = [values[min(len(values) - 1, (2 * at + 1) * len(values) // (2 * width))] for at in range(width)]
    # In eighths of a line; what is above the lowest shows at least one.
    heights = [max(round((value - low) / spread * height * 8), int(value > low)) for value in columns]
    rows = ["".join(_BLOCKS[min(8, max(0, filled - 8 * row))] for filled in heights) for row in reversed(range(height))]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    return [name, *(f"{label:>{margin}} │{row}" for label, row in zip(labels, rows, strict=True))]


def save_curves(path: Path, axis: str, places: Sequence[float], curves: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Write one panel per (name, values at `places`) under one another, as a PNG.

    Raises:
        UserError: the file can't be written.
    """
    figure = new_figure(len(curves))
    for panel, (name, values) in zip(figure.axes, curves, strict=True):
        panel.plot(places, values, drawstyle="steps-pre")
        panel.set_ylabel(name)
        panel.set_ylim(bottom=min(0.0, *values))
    figure.axes[-1].set_xlabel(axis)
    save_figure(figure, path)


def new_figure(panels: int, width: float = 9.0, height: float | None = None) -> Any:
    """A matplotlib figure of `panels` panels under one another, in inches, made without a display."""
    # Not pyplot: it keeps figures alive, and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or 1 + 2.2 * panels), layout="constrained")
    figure.subplots(panels, 1, sharex=True, squeeze=False)
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    return figure


def save_figure(figure: Any, path: Path, key: str = "--plot-file") -> None:
    """Write the figure; `key` is the option that names its place.

    Raises:
        UserError: the file can't be written.
    """
    try:
        with warnings.catch_warnings():
            # Names in scripts that its font doesn't have are drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no format
        raise user_error(key, f"the picture can't be written: {error}", "give another path", path) from error
