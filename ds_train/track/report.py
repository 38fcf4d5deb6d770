"""`ds-train report`: one HTML page about one or several runs, whole in itself, and the same curves as a PNG."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

import numpy as np

from ds_train.errors import user_error
from ds_train.track.chart import COLORS, Marker, Scale, axis_scale, band_chart, bar, duration, line_chart, text_of
from ds_train.track.grid import rank_grid
from ds_train.track.runs import Floats, Run, details, number
from ds_train.track.series import Axis, Panel, best_axis, middle, panels, phase_bands, phase_means, place, places

AXES: tuple[Axis, ...] = get_args(Axis)
_EVENTS_SHOWN = 12
_EVENTS_AT_MOST = 500
_MARKERS_AT_MOST = 80
_QUIET = ("save",)


def write_report(runs: Sequence[Run], out: Path, axis: Axis | None = None) -> None:
    """Write the page of `runs` to `out`.

    Raises:
        UserError: the file can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(runs, axis), encoding="utf-8")
    except OSError as error:
        raise user_error("--out", f"the page can't be written: {error}", "give another path", str(out)) from error


def page(runs: Sequence[Run], axis: Axis | None = None) -> str:
    """The whole page; it asks nothing of the network."""
    axis = axis or best_axis(runs)
    charts, data = _charts(runs, axis)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        ("", _summary(runs)),
        ("Curves", charts),
        ("Where a step's time goes", _breakdown(runs, axis)),
        ("Predicted and measured", _each(runs, _predicted)),
        ("Layout", _each(runs, lambda run: rank_grid(run.plan))),
        ("Events", _each(runs, _events)),
        ("Samples", _each(runs, _samples)),
        ("Facts", _facts(runs)),
    ]
    return document(title, _subtitle(runs), sections, data, _legend(runs))


def document(
    title: str, subtitle: str, sections: Sequence[tuple[str, str]], data: Mapping[str, Any], legend: str = ""
) -> str:
    """A page of sections (heading, HTML), empty ones left out; `data` is what hovering over its charts shows."""
    body = "".join(
        f"<section>{f'<h2>{escape(name)}</h2>' if name else ''}{content}</section>"
        for name, content in sections
        if content
    )
    own = files("ds_train.track")
    style, script = (own.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    # "</script>" or "<!--" in a name would end the script that holds the data.
    held = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{style}</style></head><body><main>'
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{legend}{body}</main>"
        f'<script type="application/json" id="data">{held}</script><script>{script}</script></body></html>\n'
    )


def write_pngs(runs: Sequence[Run], folder: Path, axis: Axis | None = None) -> list[Path]:
    """Write each panel as a PNG into `folder`; their paths."""
    from ds_train.track.plot import new_figure, save_figure

    axis = axis or best_axis(runs)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise user_error("--png", f"the folder can't be made: {error}", "give another path", str(folder)) from error
    for panel in panels(runs, axis):
        figure = new_figure(1, width=7.0, height=3.4)
        _draw(figure.axes[0], panel, axis)
        path = folder / f"{panel.title.lower().replace(' ', '-').replace(':', '')}.png"
        save_figure(figure, path, key="--png")
        written.append(path)
    return written


def _draw(axes: Any, panel: Panel, axis: Axis) -> None:
    looks: dict[str, dict[str, Any]] = {
        "line": {}, "faint": {"alpha": 0.25, "linewidth": 0.8}, "dashed": {"linestyle": "--"}, "dots": {"marker": "."},
    }  # fmt: skip
    large = panel.unit == "MB" and max(curve.ys.max() for curve in panel.curves) >= 1024
    unit, scale = ("GB", 1 / 1024) if large else (panel.unit, 100.0 if panel.unit == "%" else 1.0)
    for curve in panel.curves:
        label = None if curve.look in ("faint", "dashed") else _shortened(curve.label)
        axes.plot(curve.xs, curve.ys * scale, color=_color_of_png(curve.run), label=label, **looks[curve.look])
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(axis)
    axes.set_ylabel("\n".join(wrap(f"{panel.about} ({unit})" if panel.about and unit else panel.about or unit, 34)))
    if axis != "hours":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.log:
        axes.set_yscale("log")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        # One that is higher than the axes would leave them no room.
        axes.legend(frameon=False, fontsize="small").set_in_layout(False)


def _shortened(label: str) -> str:
    """Both ends of a long name: runs often differ in the last word."""
    return label if len(label) <= 60 else f"{label[:29]}…{label[-30:]}"


def _color_of_png(run: int) -> Any:
    """Ten colours, and a light one of each for the runs after them."""
    from matplotlib import colormaps

    return colormaps["tab20"](2 * (run % 10) + run // 10 % 2)


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    return (
        '<p class="legend">'
        + "".join(f"<span>{dot(i)}{escape(run.name)}</span>" for i, run in enumerate(runs))
        + "</p>"
    )


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return ""
    (run,) = runs
    size, layout = run.plan.get("size") or {}, run.plan.get("layout") or {}
    parts = []
    if size.get("parameters"):
        parts.append(f"{size.get('arch') or 'model'}, {text_of(size['parameters'])} parameters{_after_cut(run)}")
    if layout:
        ranks = math.prod(layout.values())
        parts.append(f"{ranks} rank{'s' if ranks > 1 else ''}")
    done, total = run.last["step"], run.steps
    parts.append(f"step {done:,} of {total:,}" if isinstance(total, int) else f"{done:,} steps")
    return " · ".join(parts)


def _after_cut(run: Run) -> str:
    """How many parameters are left after the last cut, in words; empty without one."""
    left = [number(event.get("parameters")) for event in run.events if event["kind"] == "cut"]
    return f", {text_of(left[-1])} after the cut" if left and math.isfinite(left[-1]) else ""


def _summary(runs: Sequence[Run]) -> str:
    """Tiles for one run, a table for several."""
    rows = [_figures(run) for run in runs]
    if len(runs) == 1:
        tiles = (f"<div><b>{value}</b><small>{name}</small></div>" for name, value in rows[0].items())
        return f'<div class="tiles">{"".join(tiles)}</div>'
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    lines = (
        f"<tr><th>{dot(index)}{escape(run.name)}</th>{''.join(f'<td>{value}</td>' for value in row.values())}</tr>"
        for index, (run, row) in enumerate(zip(runs, rows, strict=True))
    )
    return f'<div class="wide"><table class="runs"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _figures(run: Run) -> dict[str, str]:
    last = run.last
    losses, held_out = run.column("loss"), _finite(run.column("loss", "evals"))
    newest = _finite(losses[-max(1, len(losses) // 50) :])
    steps = last["step"]
    step_s = _finite(run.column("step_ms") / 1e3 if "step_ms" in last else run.column("seconds"))
    seconds = float(step_s.mean()) if len(step_s) else math.nan
    spent = seconds * steps
    return {
        "training loss": f"{newest.mean():.3f}" if len(newest) else "not finite" if "loss" in last else "–",
        "best held-out loss": f"{held_out.min():.3f}" if len(held_out) else "–",
        "steps": f"{steps:,.0f}",
        "tokens": text_of(number(last.get("tokens"))),
        "tokens/s": text_of(middle(run, "tokens_per_second")),
        "MFU": f"{100 * middle(run, 'mfu'):.1f} %" if "mfu" in last else "–",
        "peak memory of a rank": text_of(_highest(run, "memory_peak_mb"), "MB"),
        "time in steps": duration(spent),
    }


def _charts(runs: Sequence[Run], axis: Axis) -> tuple[str, dict[str, Any]]:
    drawn = panels(runs, axis)
    across = _across(runs, axis)
    markers = _markers(runs, axis)
    html: list[str] = []
    data: dict[str, Any] = {}
    for index, panel in enumerate(drawn):
        chart, hover = line_chart(panel, across, axis, markers, f"chart{index}")
        html.append(chart)
        data[f"chart{index}"] = hover
    data["markers"] = [{"x": marker.x, "text": marker.text} for marker in markers]
    loud, quiet = ({marker.text.rpartition(": ")[2] for marker in markers if marker.quiet is q} for q in (False, True))
    notes = [
        f'<i class="{mark}"></i>{escape(", ".join(sorted(kinds)))}'
        for mark, kinds in (("loud", loud), ("tick", quiet))
        if kinds
    ]
    legend = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return f'{legend}<div class="charts">{"".join(html)}</div>', data


def _across(runs: Sequence[Run], axis: Axis) -> Scale:
    found = np.concatenate([_finite(places(run, axis)) for run in runs])
    return axis_scale(0.0, float(found.max(initial=1e-9)), whole=axis != "hours")


def _markers(runs: Sequence[Run], axis: Axis) -> list[Marker]:
    found = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for event in run.events:
            x = place(run, axis, event)
            if math.isfinite(x):
                found.append(Marker(x, prefix + event["kind"], event["kind"] in _QUIET))
    loud, quiet = ([marker for marker in found if marker.quiet is q] for q in (False, True))
    return [*loud[:: 1 + len(loud) // _MARKERS_AT_MOST], *quiet[:: 1 + len(quiet) // _MARKERS_AT_MOST]]


def _breakdown(runs: Sequence[Run], axis: Axis) -> str:
    shown = []
    for index, run in enumerate(runs):
        means = phase_means(run)
        if not means:
            continue
        total = sum(means.values()) or 1.0
        name = f"<h3>{dot(index)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        keys = "".join(
            f'<li><i style="background:var(--p-{phase})"></i>{phase} <b>{text_of(ms, "ms")}</b> '
            f"<small>{100 * ms / total:.1f} %</small></li>"
            for phase, ms in means.items()
        )
        shown.append(f'{name}{bar(means)}<ul class="phases">{keys}</ul>')
    if len(runs) == 1 and shown:
        xs, bands = phase_bands(runs[0], axis)
        if len(xs) > 1:
            plot = band_chart(xs, bands, axis_scale(min(xs), max(xs), whole=axis != "hours"), axis)
            caption = "<figcaption>Step time <small>mean of all ranks</small></figcaption>"
            shown.append(f'<figure class="chart">{caption}{plot}</figure>')
    return "".join(shown)


def _predicted(run: Run) -> str:
    run, limits = _before_cut(run)
    predicted = run.plan.get("predicted") or {}
    parts = predicted.get("step_parts") or {}
    means = phase_means(run)

    def part(*names: str) -> float:
        return 1e3 * sum(parts[name] for name in names) if parts else math.nan

    def phase(*names: str) -> float:
        return sum(means.get(name, 0.0) for name in names) if means else math.nan

    # On a CPU memory is the whole process's, of which plans leave the libraries out.
    on_cpu = (run.plan.get("cluster") or {}).get("device") == "cpu"
    peak = f"peak memory of a rank{', measured with libraries' if on_cpu else ''}"
    rows = [
        (peak, number(predicted.get("device_bytes")) / 2**20, _highest(run, "memory_peak_mb"), "MB"),
        ("step", 1e3 * number(predicted.get("step_seconds")), middle(run, "step_ms"), "ms"),
        ("forward, backward", part("products", "memory"), phase("forward", "backward"), "ms"),
        ("communication", part("tensor", "sequence", "pipeline", "data"), phase("collectives", "pipeline"), "ms"),
        ("optimizer", part("update", "offload"), phase("optimizer"), "ms"),
    ]
    lines = [_pair(*row) for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
    if not lines:
        return ""
    figures = f" with the figures of {escape(str(predicted['hardware']))}" if predicted.get("hardware") else ""
    note = f'<p class="note"><i class="hollow"></i>predicted{figures} <i class="full"></i>measured{limits}</p>'
    return f'{note}<div class="pairs">{"".join(lines)}</div>'


def _before_cut(run: Run) -> tuple[Run, str]:
    """A run until units are cut out of its model, which the plan is of, and what to say of that."""
    cuts = [number(event.get("step")) for event in run.events if event["kind"] == "cut"]
    cut = min(filter(math.isfinite, cuts), default=0)
    until = [record for record in run.train if record["step"] <= cut]
    return (replace(run, train=until, _columns={}), f" up to the cut after step {cut:,.0f}") if until else (run, "")


def _pair(name: str, predicted: float, measured: float, unit: Any) -> str:
    most = max(predicted, measured) or 1.0
    bars = "".join(
        f'<div class="track"><i class="{kind}" style="width:{100 * value / most:.1f}%"></i></div>'
        f"<span>{text_of(value, unit)}</span>"
        for kind, value in (("hollow", predicted), ("full", measured))
    )
    ratio = f"× {measured / predicted:.2f}" if predicted else ""
    return f'<div class="pair"><b>{name}</b><em>{ratio}</em>{bars}</div>'


def _events(run: Run) -> str:
    if not run.events:
        return ""
    counts = Counter(event["kind"] for event in run.events)
    chips = "".join(f"<li>{escape(kind)} <b>{count:,}</b></li>" for kind, count in counts.most_common())
    loud = [event for event in run.events if event["kind"] not in _QUIET]
    newest = _event_table(loud[-_EVENTS_SHOWN:]) if loud else ""
    count = min(_EVENTS_AT_MOST, len(run.events))
    more = f"<details><summary>the last {count}, all kinds</summary>{_event_table(run.events[-count:])}</details>"
    return f'<ul class="chips">{chips}</ul>{newest}{more}'


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        f"<tr><td>{escape(str(event.get('step', '')))}</td><td>{escape(event['kind'])}</td>"
        f"<td>{escape(details(event))}</td></tr>"
        for event in reversed(events)
    )
    head = "<tr><th>step</th><th>event</th><th></th></tr>"
    return f'<div class="wide"><table class="events">{head}{"".join(rows)}</table></div>'


def _samples(run: Run) -> str:
    shown = (
        f'<p class="note">step {sample.get("step", "?")}</p><pre><b>{escape(str(sample.get("prompt", "")))}</b>'
        f"{escape(str(sample.get('text', '')))}</pre>"
        for sample in run.samples[-3:]
    )
    return "".join(shown)


def _facts(runs: Sequence[Run]) -> str:
    columns = [_facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    head = f"<tr><th></th>{''.join(f'<th>{escape(run.name)}</th>' for run in runs)}</tr>" if len(runs) > 1 else ""
    rows = (
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(facts.get(name) or '')}</td>" for facts in columns)
        + "</tr>"
        for name in names
    )
    table = "".join(rows)
    return f'<div class="wide"><table class="facts">{head}{table}</table></div>' if table else ""


def _facts_of(run: Run) -> dict[str, str]:
    """What the recipe, the plan and the records say of a run, by name."""
    recipe, plan = run.recipe, run.plan
    model, data = recipe.get("model") or {}, recipe.get("data") or {}
    optimizer, schedule, batch = (recipe.get(key) or {} for key in ("optimizer", "schedule", "batch"))
    size, cluster = plan.get("size") or {}, plan.get("cluster") or {}
    facts = {
        "model": model.get("path") or model.get("arch"),
        "parameters": f"{size['parameters']:,}{_after_cut(run)}" if size.get("parameters") else None,
        "task": (recipe.get("task") or {}).get("kind"),
        "data": " ".join(str(data[key]) for key in ("source", "path") if data.get(key)),
        "sequence length": data.get("sequence_length"),
        "samples a step": batch.get("global_samples"),
        "micro-batch": _micro_batch(plan.get("batch") or {}),
        "optimizer": _words(optimizer, "kind", "lr", "weight_decay"),
        "schedule": _words(schedule, "kind", "steps", "epochs", "tokens", "warmup_fraction"),
        "precision": (recipe.get("precision") or {}).get("dtype"),
        "seed": recipe.get("seed"),
        "devices": f"{cluster.get('ranks')} {cluster.get('kind') or cluster.get('device')}" if cluster else None,
        "slowest rank": run.last.get("slowest_rank"),
        "versions": ", ".join(f"{name} {text}" for name, text in (plan.get("versions") or {}).items()),
        "tags": ", ".join((recipe.get("track") or {}).get("tags") or ()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _micro_batch(batch: Mapping[str, Any]) -> str:
    micro, times = batch.get("micro_samples"), batch.get("accumulation")
    return f"{micro} samples, {times} a step and data rank" if micro and times else ""


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(
        str(section[key]) if key == "kind" else f"{key.replace('_', ' ')} {section[key]}"
        for key in keys
        if section.get(key) is not None
    )


def _each(runs: Sequence[Run], make: Any) -> str:
    """What `make` says of each run, under its name where there are several."""
    made = [(index, run, make(run)) for index, run in enumerate(runs)]
    name = "<h3>{}{}</h3>" if len(runs) > 1 else ""
    return "".join(name.format(dot(index), escape(run.name)) + html for index, run, html in made if html)


def dot(index: int) -> str:
    """The key of what is drawn in colour number `index`."""
    return f'<i class="key" style="background:var(--c{index % COLORS})"></i>'


def _highest(run: Run, key: str) -> float:
    return float(_finite(run.column(key)).max(initial=-math.inf)) if key in run.last else math.nan


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]
