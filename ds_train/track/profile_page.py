"""RUN/profile/profile.html: findings, phases by rank, operators and memory of a profiled window."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ds_train.track.chart import axis_scale, bar, line_chart, text_of
from ds_train.track.findings import RankProfile, operator_table
from ds_train.track.report import document, dot
from ds_train.track.series import Curve, Panel

_BARS = 64


def profile_page(name: str, steps: tuple[int, int], profiles: Sequence[RankProfile], sentences: Sequence[str]) -> str:
    """The page; `profiles` of every rank, recorded or not."""
    recorded = [profile for profile in profiles if profile.operators is not None]
    memory, data = _memory(recorded)
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    sections = [
        ("Findings", f'<ol class="findings">{items}</ol>'),
        ("Where a step's time goes", _phases(profiles)),
        ("Memory of tensors", memory),
        *((f"Operators of rank {profile.rank}", _operators(profile)) for profile in recorded),
    ]
    return document(f"{name}, steps {steps[0]} to {steps[1]}", "", sections, data)


def _phases(profiles: Sequence[RankProfile]) -> str:
    names = profiles[0].phase_ms
    means = {phase: sum(p.phase_ms[phase] for p in profiles) / len(profiles) for phase in names}
    total = sum(means.values()) or 1.0
    keys = "".join(
        f'<li><i style="background:var(--p-{phase})"></i>{phase} <b>{text_of(ms, "ms")}</b> '
        f"<small>{ms / total:.1%}</small></li>"
        for phase, ms in means.items()
        if ms
    )
    bars = "".join(f"<p class='note'>rank {p.rank}</p>{bar(p.phase_ms)}" for p in profiles[:_BARS])
    return f'<ul class="phases">{keys}</ul>{bars}'


def _memory(recorded: Sequence[RankProfile]) -> tuple[str, dict[str, Any]]:
    curves = []
    for index, profile in enumerate(recorded):
        if len(profile.memory) > 1:
            xs, ys = (np.repeat(values, 2) for values in zip(*profile.memory, strict=True))
            # What is held stays until the next one is taken or given back: steps, no slopes.
            curves.append(Curve(f"rank {profile.rank}", index, "line", xs[1:], ys[:-1]))
    if not curves:
        return "", {}
    panel = Panel("Memory", "MB", "more than at the beginning", curves)
    across = axis_scale(0.0, max(float(curve.xs[-1]) for curve in curves))
    html, hover = line_chart(panel, across, "ms", [], "memory")
    names = "".join(f"<span>{dot(curve.run)}{curve.label}</span>" for curve in curves)
    return f'<p class="legend">{names}</p>{html}', {"memory": hover, "markers": []}


def _operators(profile: RankProfile) -> str:
    head = "<tr><th>operator</th><th>of all time</th><th>ms a step</th><th>calls a step</th></tr>"
    rows = (
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in operator_table(profile, rows=25)
    )
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
