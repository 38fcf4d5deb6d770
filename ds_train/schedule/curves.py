"""Every schedule of a recipe as curves over its tokens, for people to look at before a run."""

from __future__ import annotations

from dataclasses import dataclass

from ds_train.config import RunConfig
from ds_train.schedule.distill import teacher_share
from ds_train.schedule.layer_drop import kept_share
from ds_train.schedule.learning_rate import learning_rate_factor, plan_length
from ds_train.schedule.prune import closed_share, prune_steps
from ds_train.schedule.timeline import cut_timeline
from ds_train.schedule.token_drop import kept_tokens

POINTS = 400
_ANY_STEPS = 1000


@dataclass(frozen=True)
class Curve:
    """What one schedule does along a run: `values[i]` holds at place i of the run's `Curves.tokens`."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """All curves of a recipe over `tokens` consumed; over the share of the run where only data say its length."""

    tokens: tuple[float, ...]
    axis: str
    curves: tuple[Curve, ...]


def recipe_curves(run: RunConfig, points: int = POINTS) -> Curves:
    """The curves of `run` after `points` of its steps, the last at its end."""
    total, known = _total_tokens(run)
    timeline = cut_timeline(run, total)
    steps = [max(1, timeline.steps * (point + 1) // points) for point in range(points)]
    tokens = [timeline.tokens_after(step) for step in steps]
    base = [run.optimizer.lr * learning_rate_factor(run.schedule, place, total) for place in tokens]
    curves = [Curve("learning rate", tuple(base))]
    for pattern, factor in run.optimizer.lr_factors.items():
        curves.append(Curve(f"learning rate of {pattern}", tuple(factor * value for value in base)))
    if len(timeline.stretches) > 1:
        shapes = [timeline.at(step - 1) for step in steps]
        curves.append(Curve("tokens per sample", tuple(float(shape.length) for shape in shapes)))
        curves.append(Curve("tokens per patch", tuple(float(shape.patch) for shape in shapes)))
        curves.append(Curve("samples per step", tuple(float(shape.samples) for shape in shapes)))
    if run.token_drop.kind != "none":
        starts = [timeline.at(step - 1) for step in steps]
        kept = [kept_tokens(run.token_drop, shape.length, shape.before, total) for shape in starts]
        curves.append(Curve("tokens that middle layers take", tuple(map(float, kept))))
    if run.layer_drop.kind != "none":
        before = [timeline.at(step - 1).before for step in steps]
        kept_layers = tuple(kept_share(run.layer_drop, place, total) for place in before)
        curves.append(Curve("share of steps with the last layer", kept_layers))
    distill = run.compress.distill
    if distill.alpha_end is not None:
        before = [timeline.at(step - 1).before for step in steps]
        curves.append(Curve("teacher's share", tuple(teacher_share(distill, place, total) for place in before)))
    if run.compress.prune.kinds:
        pruned = prune_steps(run.compress.prune, timeline)
        closed = [1.0 if step > pruned.cut else closed_share(run.compress.prune, place, total)
                  for step, place in zip(steps, tokens, strict=True)]  # fmt: skip
        curves.append(Curve("share of the chosen units that are closed", tuple(closed)))
    places = tuple(float(place) if known else place / total for place in tokens)
    return Curves(places, "tokens" if known else "share of the run", tuple(curves))


def _total_tokens(run: RunConfig) -> tuple[int, bool]:
    """Tokens of the run, and whether the recipe alone says them: epochs are known once the data are."""
    per_step = run.batch.global_samples * run.data.sequence_length
    if run.schedule.epochs is not None:
        return _ANY_STEPS * per_step, False
    return plan_length(run.schedule, per_step, 0, run.batch.global_samples) * per_step, True
