"""When a run that prunes scores, closes and cuts its units, as pure functions of the clock."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ds_train.config.compress import PruneSection
from ds_train.schedule.timeline import Timeline

_STAGES = 4


@dataclass(frozen=True)
class PruneSteps:
    """Steps counted from 0: scores are summed from `scored` on, units chosen before `chosen`, cut out before `cut`."""

    scored: int
    chosen: int
    cut: int


def prune_steps(section: PruneSection, timeline: Timeline) -> PruneSteps:
    """The steps at which the section's shares of the run are reached: at least one is scored, and one is after the cut.

    Raises:
        ValueError: the run has one step.
    """
    if timeline.steps < 2:
        raise ValueError("the run has one step")

    def first(share: float) -> int:
        target = share * timeline.total_tokens
        return bisect_left(range(timeline.steps), target, key=lambda step: timeline.at(step).before)

    chosen = min(max(1, first(section.start)), timeline.steps - 1)
    cut = min(max(chosen, first(section.end)), timeline.steps - 1)
    return PruneSteps(max(0, chosen - section.score_steps), chosen, cut)


def closed_share(section: PruneSection, tokens: int, total_tokens: int) -> float:
    """Share of the chosen units that are closed in a step that starts at `tokens` consumed of `total_tokens`."""
    if section.shape == "one-shot" or section.end <= section.start:
        return 0.0
    progress = (tokens / total_tokens - section.start) / (section.end - section.start)
    progress = min(1.0, max(0.0, progress))
    if section.shape == "cubic":
        return 1.0 - (1.0 - progress) ** 3
    return math.floor(progress * _STAGES + 1e-9) / _STAGES if section.shape == "steps" else progress


def unit_values(order: Sequence[int], units: int, closed: float) -> list[float]:
    """What each of `units` outputs is multiplied by when the share `closed` of `order` is closed, first ones first."""
    values = [1.0] * units
    for place, unit in enumerate(order):
        values[unit] = 1.0 - min(1.0, max(0.0, closed * len(order) - place))
    return values
