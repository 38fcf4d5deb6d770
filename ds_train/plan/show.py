"""Plans for people: tables of layout, memory, step time, choices and rejections."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from ds_train.plan.after_cut import AfterCut
from ds_train.plan.hardware import GIB
from ds_train.plan.make import RunPlan, like_steps
from ds_train.plan.predict import Prediction
from ds_train.plan.search import FILLED, Search
from ds_train.plan.why import Explanation

_MIB = 2**20


def show_plan(made: RunPlan, console: Console | None = None, after: AfterCut | None = None) -> None:
    """Print a plan, and what follows the cut of a run that prunes."""
    console = console or _console()
    run, layout, batch = made.run, made.layout, made.batch
    size = f"about {made.parameters:,} parameters" if made.parameters else "size unknown until the model is loaded"
    kind = made.cluster.kind or made.cluster.device
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("model", escape(f"{run.model.arch or run.model.path}, {size}"))
    table.add_row(
        "layout",
        f"{layout.ranks} {kind} rank{'' if layout.ranks == 1 else 's'} = pipe {layout.pipe} x data {layout.data} "
        f"x sequence {layout.sequence} x tensor {layout.tensor}, ZeRO-{made.zero_stage}",
    )
    table.add_row(
        "batch",
        f"{batch.global_samples} samples = micro {batch.micro_samples} x accumulation {batch.accumulation} "
        f"x data ranks {layout.data}; {batch.global_samples * run.data.sequence_length:,} tokens a step",
    )
    if made.predicted is not None:
        for name, text in _summary(made.predicted, batch.global_samples * run.data.sequence_length).items():
            table.add_row(name, text)
        steps = like_steps(run)
        if made.predicted.step is not None and steps is not None and (after is None or after.step_seconds is not None):
            table.add_row("run", _whole_run(made, steps, _mean_step(made.predicted.step.seconds, after)))
    if after is not None:
        table.add_row("cut", _cut(after, made))
    for note in made.notes:
        table.add_row("note", escape(note))
    console.print(table)
    if made.predicted is not None:
        console.print(_memory_table(made.predicted))
    if made.search is not None:
        _show_search(made.search, console)
    console.print(Syntax(json.dumps(made.deepspeed_json, indent=2), "json", background_color="default"))


def show_explanation(explained: Explanation, console: Console | None = None) -> None:
    """Print what `--why` asked for."""
    console = console or _console()
    if explained.scored is None or explained.predicted is None:
        console.print(f"{explained.question}: no. {escape(explained.against or '')}")
        return
    verdict = f"no, it {explained.against}" if explained.against else "it fits"
    console.print(f"{explained.question}: {verdict}; at best {explained.scored.label}")
    run, choice = explained.scored.run, explained.scored.choice
    samples = choice.micro_samples * choice.accumulation * choice.layout.data
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _summary(explained.predicted, samples * run.data.sequence_length).items():
        table.add_row(name, text)
    console.print(table)
    console.print(_memory_table(explained.predicted))
    if explained.predicted.step is not None:
        console.print(_time_table(explained.predicted.step.parts()))


def _console() -> Console:
    """Of the terminal's width; wide enough for every line where the output is read by something else."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _whole_run(made: RunPlan, steps: int, step_seconds: float) -> str:
    seconds = steps * step_seconds
    hours = seconds * made.layout.ranks / 3600
    in_words = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    cost = f"{in_words} {made.cluster.kind or made.cluster.device}-hours"
    return f"{steps:,} steps, {_seconds(seconds)}, {cost} (predicted; without start, evaluation and saving)"


def _mean_step(seconds: float, after: AfterCut | None) -> float:
    """Mean time of a run's steps, of which those after the cut take another."""
    if after is None or after.step_seconds is None:
        return seconds
    return after.share * seconds + (1 - after.share) * after.step_seconds


def _cut(after: AfterCut, made: RunPlan) -> str:
    """What a run is from the cut on."""
    when, section = f"after {after.share:.0%} of the run", made.run.compress.prune
    if after.left is None:
        timed = section.latency is not None or section.latency_ms is not None
        return f"{when}, to sizes that {'measured times' if timed else 'the loaded model'} will tell"
    sizes = ", ".join(f"{kind} {count}" for kind, count in after.left.items())
    count = after.size.parameters if after.size else None
    parts = [f"about {count:,} parameters ({sizes})" if count else sizes]
    if after.plan.layout != made.layout or after.plan.zero_stage != made.zero_stage:
        layout = after.plan.layout
        parts.append(
            f"pipe {layout.pipe} x data {layout.data} x sequence {layout.sequence} x tensor {layout.tensor}, "
            f"ZeRO-{after.plan.zero_stage}"
        )
    if after.predicted is not None:
        short = after.predicted.shortage
        peak = f"{_size(after.predicted.worst.device_bytes)} at a rank's peak"
        parts.append(f"a rank {short}: it may run out of memory" if short else peak)
    if after.step_seconds is not None:
        parts.append(f"{_seconds(after.step_seconds)} a step")
    return f"{when}: {'; '.join(parts)} (predicted)"


def _summary(predicted: Prediction, tokens: int) -> dict[str, str]:
    worst = predicted.worst
    of = f" of {_size(predicted.limit_bytes)}" if predicted.limit_bytes else ""
    host = f", {_size(worst.host_bytes)} of host memory" if worst.host_bytes else ""
    rows = {"memory": f"{_size(worst.device_bytes)}{of} at a rank's peak{host} (predicted)"}
    if predicted.step is not None:
        seconds = predicted.step.seconds
        rate = f"{tokens / seconds:,.0f} tokens/s, {predicted.tflops_per_device:.3g} TFLOP/s a rank"
        rows["step"] = f"{_seconds(seconds)}, {rate} (predicted from the figures of {predicted.hardware})"
    return rows


def _memory_table(predicted: Prediction) -> Table:
    """Bytes by item of the first, the worst and the last stage."""
    worst = predicted.worst
    shown = {0: predicted.stages[0], worst.stage: worst, len(predicted.stages) - 1: predicted.stages[-1]}
    table = Table(box=None, pad_edge=False, title="memory of a rank", title_justify="left")
    table.add_column("")
    several = len(predicted.stages) > 1
    for number in sorted(shown):
        table.add_column(f"stage {number}" if several else "peak", justify="right")
    for place in ("device", "host"):
        items: dict[str, None] = {}
        for rank in shown.values():
            items |= dict.fromkeys(getattr(rank, place))
        for item in items:
            sizes = [getattr(shown[number], place).get(item) for number in sorted(shown)]
            cells = ["" if size is None else _size(size) for size in sizes]
            table.add_row(f"{item} (host)" if place == "host" else item, *cells)
    return table


def _time_table(parts: Mapping[str, float]) -> Table:
    table = Table(box=None, pad_edge=False, title="a step", title_justify="left", show_header=False)
    for name, seconds in parts.items():
        if seconds:
            table.add_row(name, _seconds(seconds))
    return table


def _show_search(found: Search, console: Console) -> None:
    of = f" that fill at most {FILLED:.0%} of a device's memory" if found.limited else ""
    console.print(f"chosen from {found.considered:,} ways to run it{of}")
    table = Table(box=None, pad_edge=False)
    for name in ("", "layout", "memory", "step"):
        table.add_column(name, justify="right" if name in ("memory", "step") else "left")
    for place, scored in enumerate(found.ranked):
        mark = "chosen" if place == 0 else "next"
        table.add_row(mark, scored.label, _size(scored.memory.device_bytes), _seconds(scored.seconds))
    console.print(table)
    for rejected in found.rejected:
        console.print(f"rejected {rejected.label}: {escape(rejected.reason)}")


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / _MIB:.0f} MiB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2f} s"
