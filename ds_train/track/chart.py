"""Charts as HTML: an SVG that stretches to any width, with labels beside it that keep their size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from typing import Any

from ds_train.track.runs import Floats
from ds_train.track.series import Curve, Panel, Unit

_WIDTH, _HEIGHT = 1000.0, 300.0
"""Of the SVG's own coordinates; the page stretches them."""
_FOREVER_S = 1e12
COLORS = 16
"""Colours of runs that the style sheet knows: --c0 to --c15."""


@dataclass(frozen=True)
class Marker:
    """Something that happened at `x` of the axis; `quiet` ones are many, such as checkpoints."""

    x: float
    text: str
    quiet: bool


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` -> shares of an axis from 0 to 1, with the values that are labelled."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = field(default=())

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


def linear_scale(low: float, high: float, ticks: int = 5) -> Scale:
    """From a round value at or below `low` to one at or above `high`; rounding errors are no range."""
    if high - low <= 1e-6 * max(abs(high), abs(low)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = _round_step((high - low) / ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, ticks=tuple(_clean(step * k) for k in range(first, last + 1)))


def log_scale(low: float, high: float) -> Scale:
    """From the power of ten at or below `low` to that at or above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 5))
    return Scale(10.0**first, 10.0**last, True, tuple(10.0**k for k in range(first, last + 1, every)))


def axis_scale(low: float, high: float, whole: bool = False) -> Scale:
    """Exactly from `low` to `high`, with round labels within; `whole` ones of what is counted."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 5)
    if whole and step % 1:
        step = max(1.0, _round_step(2 * step))
    ticks = tuple(_clean(step * k) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, ticks=ticks)


def text_of(value: float, unit: Unit = "", digits: int = 0) -> str:
    """A value for people: 1.2M, 3.4 GB, 56 %, 0.002, 2e-05; of at least `digits` significant digits."""
    if not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{_plain(100 * value, max(4, digits))} %"
    large = {"MB": ("GB", 1024.0), "ms": ("s", 1000.0)}.get(unit)
    if large is not None:
        name, factor = large if abs(value) >= large[1] else (unit, 1.0)
        return f"{_plain(value / factor, max(3, digits))} {name}"
    size = abs(value)
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{_plain(value / (1e3 if letter == 'k' else factor), max(3, digits))}{letter}"
    return _plain(value, max(4, digits))


def tick_texts(scale: Scale, unit: Unit = "") -> list[str]:
    """A text for each tick, of as many digits as tell it from its neighbours."""
    ticks = scale.ticks
    if scale.log or len(ticks) < 2:
        return [text_of(tick, unit) for tick in ticks]
    # Ticks are multiples of 1, 2, 2.5 or 5 times a power of ten: in 25ths of it they all are whole numbers.
    most = 25 * max(map(abs, ticks)) / (ticks[1] - ticks[0])
    return [text_of(tick, unit, digits=len(f"{most:.0f}")) for tick in ticks]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 8:11:52."""
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < _FOREVER_S else "–"


def line_chart(panel: Panel, across: Scale, axis: str, markers: Sequence[Marker], chart_id: str) -> tuple[str, Any]:
    """(HTML of the panel, what its hover text needs, for JSON)."""
    up = _scale_up(panel)
    curves = "".join(_curve(curve, across, up) for curve in panel.curves)
    body = _plot(up, across, panel.unit, curves + _marks(markers, across), axis)
    note = f"{panel.about}{', log scale' if panel.log else ''}"
    html = (
        f'<figure id="{chart_id}" class="chart"><figcaption>{escape(panel.title)} '
        f"<small>{escape(note)}</small></figcaption>{body}</figure>"
    )
    shown = [curve for curve in panel.curves if curve.look != "faint"]
    data = {
        "x": [across.low, across.high],
        "unit": panel.unit,
        "curves": [
            {"name": curve.label, "color": curve.run % COLORS, "x": _short(curve.xs), "y": _short(curve.ys)}
            for curve in shown
        ],
    }
    return html, data


def band_chart(xs: Sequence[float], bands: Mapping[str, Sequence[float]], across: Scale, axis: str) -> str:
    """Bands on top of one another, by name; their colours are the style sheet's --p-NAME."""
    totals = [sum(values) for values in zip(*bands.values(), strict=True)]
    up = linear_scale(0.0, max(totals))
    below = [0.0] * len(xs)
    shapes = []
    for name, values in bands.items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        outline = [*zip(xs, above, strict=True), *reversed(list(zip(xs, below, strict=True)))]
        path = _path([x for x, _ in outline], [y for _, y in outline], across, up)
        shapes.append(f'<path class="band" style="fill:var(--p-{name})" d="{path}Z"/>')
        below = above
    return _plot(up, across, "ms", "".join(shapes), axis)


def bar(shares: Mapping[str, float]) -> str:
    """One horizontal bar of parts, by name, as wide as their share of the sum."""
    total = sum(shares.values()) or 1.0
    parts = (
        f'<i style="width:{100 * value / total:.2f}%;background:var(--p-{name})" title="{name}"></i>'
        for name, value in shares.items()
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def _plot(up: Scale, across: Scale, unit: Unit, inner: str, axis: str) -> str:
    grid = "".join(
        f'<line class="grid" x1="0" x2="{_WIDTH:g}" y1="{_y(up(tick)):g}" y2="{_y(up(tick)):g}"/>' for tick in up.ticks
    )
    left = "".join(
        f'<b style="top:{100 * (1 - up(tick)):.2f}%">{text}</b>'
        for tick, text in zip(up.ticks, tick_texts(up, unit), strict=True)
    )
    below = "".join(
        f'<b style="left:{100 * across(tick):.2f}%">{text}</b>'
        for tick, text in zip(across.ticks, tick_texts(across), strict=True)
    )
    return (
        f'<div class="plot"><div class="left">{left}</div><div class="area">'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">{grid}{inner}</svg>'
        f'<div class="cross"></div></div><div class="below">{below}</div><div class="axis">{escape(axis)}</div></div>'
    )


def _curve(curve: Curve, across: Scale, up: Scale) -> str:
    color = f"--k:var(--c{curve.run % COLORS})"
    line = f'<path class="{curve.look}" style="{color}" d="{_path(curve.xs, curve.ys, across, up)}"/>'
    few = len(curve.xs) <= 40 and curve.look in ("line", "dots")
    if curve.look != "dots" and not (few and len(curve.xs) == 1):
        return line
    # A line of no length with round ends is a dot that stays round however the drawing is stretched.
    dots = "".join(f"M{_x(across(x)):.2f} {_y(up(y)):.2f}h0" for x, y in zip(curve.xs, curve.ys, strict=True))
    return line + (f'<path class="dot" style="{color}" d="{dots}"/>' if len(curve.xs) <= 40 else "")


def _marks(markers: Sequence[Marker], across: Scale) -> str:
    lines = []
    for marker in markers:
        if across.low <= marker.x <= across.high:
            x, top = _x(across(marker.x)), _HEIGHT - 10 if marker.quiet else 0
            kind = "quiet" if marker.quiet else "event"
            lines.append(f'<line class="{kind}" x1="{x:.2f}" x2="{x:.2f}" y1="{top:g}" y2="{_HEIGHT:g}"/>')
    return "".join(lines)


def _path(xs: Sequence[float] | Floats, ys: Sequence[float] | Floats, across: Scale, up: Scale) -> str:
    points = (f"{_x(across(x)):.1f} {_y(up(y)):.1f}" for x, y in zip(xs, ys, strict=True))
    return "M" + "L".join(points)


def _x(share: float) -> float:
    return share * _WIDTH


def _y(share: float) -> float:
    return (1.0 - share) * _HEIGHT


def _scale_up(panel: Panel) -> Scale:
    """From 0 where the values are far from being alike; memory of gigabytes has round ones."""
    low = min(float(curve.ys.min()) for curve in panel.curves)
    high = max(float(curve.ys.max()) for curve in panel.curves)
    if panel.log:
        return log_scale(low, high)
    unit = 1024.0 if panel.unit == "MB" and high >= 1024 else 1.0
    scale = linear_scale(0.0 if 0 < low < 0.5 * high else low / unit, high / unit)
    return Scale(scale.low * unit, scale.high * unit, ticks=tuple(tick * unit for tick in scale.ticks))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _plain(value: float, digits: int) -> str:
    """`value` to significant digits; a large one in full, as people don't read 1.25e+03."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text


def _clean(value: float) -> float:
    return float(f"{value:.10g}")


def _short(values: Floats) -> list[float]:
    return [json.loads(f"{value:.6g}") for value in values]
