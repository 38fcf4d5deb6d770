"""Pruning on the run's clock."""

from __future__ import annotations

import pytest

from ds_train.config.compress import PruneSection
from ds_train.plan.prune import units_left
from ds_train.schedule.prune import PruneSteps, closed_share, prune_steps, unit_values
from ds_train.schedule.timeline import StepShape, Timeline


def timeline(steps: int) -> Timeline:
    return Timeline((StepShape(0, 4, 10, 0, 0, 1),), steps, steps * 40)


@pytest.mark.parametrize(
    ("steps", "start", "end", "scored", "expected"),
    [
        (100, 0.1, 0.5, 16, PruneSteps(0, 10, 50)),
        (100, 0.4, 0.5, 16, PruneSteps(24, 40, 50)),
        (100, 0.0, 0.0, 3, PruneSteps(0, 1, 1)),  # something is always scored
        (100, 0.2, 0.999, 5, PruneSteps(15, 20, 99)),  # and a step is always left after the cut
        (2, 0.9, 0.9, 5, PruneSteps(0, 1, 1)),
    ],
)
def test_shares_of_the_run_become_steps(
    steps: int, start: float, end: float, scored: int, expected: PruneSteps
) -> None:
    section = PruneSection(start=start, end=end, score_steps=scored)
    assert prune_steps(section, timeline(steps)) == expected


def test_a_run_of_one_step_has_no_time_to_prune() -> None:
    with pytest.raises(ValueError, match="one step"):
        prune_steps(PruneSection(), timeline(1))


@pytest.mark.parametrize(
    ("shape", "at_quarter", "at_half"),
    [("cubic", 1 - 0.75**3, 0.875), ("linear", 0.25, 0.5), ("steps", 0.25, 0.5), ("one-shot", 0.0, 0.0)],
)
def test_shapes(shape: str, at_quarter: float, at_half: float) -> None:
    section = PruneSection(shape=shape, start=0.2, end=0.6)
    shares = [closed_share(section, tokens, 1000) for tokens in (200, 300, 400)]
    assert shares == pytest.approx([0.0, at_quarter, at_half])
    assert closed_share(section, 390, 1000) == pytest.approx(0.25 if shape == "steps" else shares[2], abs=0.08)


def test_units_close_in_their_order_and_the_one_that_is_closing_is_dimmed() -> None:
    assert unit_values([3, 0], 4, 0.0) == [1.0] * 4
    assert unit_values([3, 0], 4, 0.25) == [1.0, 1.0, 1.0, 0.5]
    assert unit_values([3, 0], 4, 0.75) == [0.5, 1.0, 1.0, 0.0]
    assert unit_values([3, 0], 4, 1.0) == [0.0, 1.0, 1.0, 0.0]


def test_shares_leave_whole_units_never_fewer_than_asked() -> None:
    sizes = {"heads": 8, "ffn": 100, "hidden": 64, "layers": 12}
    section = PruneSection(heads=0.3, ffn=0.5, hidden=0.3, layers=2)
    assert units_left(section, sizes, tied=False) == {"heads": 6, "ffn": 56, "hidden": 48, "layers": 10}
    assert units_left(section, sizes, tied=True)["hidden"] == 48  # 6 of 8 heads of 8
    assert units_left(section, {"ffn": 100}, tied=False, scale=0.5) == {"ffn": 80}
