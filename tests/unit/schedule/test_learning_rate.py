"""Learning-rate curves against formulas written down separately."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest

from ds_train.config.schedule import ScheduleSection
from ds_train.schedule.learning_rate import learning_rate_factor, plan_length

TOTAL = 1000
KINDS = get_args(ScheduleSection.model_fields["kind"].annotation)


def curve(**keys: object) -> list[float]:
    schedule = ScheduleSection.model_validate({"steps": 1, **keys})
    return [learning_rate_factor(schedule, tokens, TOTAL) for tokens in range(1, TOTAL + 1)]


def test_cosine_equals_its_formula() -> None:
    values = curve(kind="cosine", warmup_fraction=0.1, final_ratio=0.2)
    for tokens, value in enumerate(values, start=1):
        expected = tokens / 100 if tokens < 100 else 0.2 + 0.8 * (1 + math.cos(math.pi * (tokens - 100) / 900)) / 2
        assert value == pytest.approx(expected, abs=1e-12)


def test_linear_equals_its_formula() -> None:
    values = curve(kind="linear", warmup_fraction=0.25, final_ratio=0.0)
    assert values[124] == pytest.approx(0.5)
    assert values[249] == 1.0
    assert values[624] == pytest.approx(0.5)
    assert values[-1] == 0.0


def test_wsd_is_flat_between_warmup_and_decay() -> None:
    values = curve(kind="wsd", warmup_fraction=0.1, decay_fraction=0.3, final_ratio=0.1)
    assert set(values[100:700]) == {1.0}
    assert values[849] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)


def test_restarts_are_the_cosine_of_torch() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=100, T_mult=2, eta_min=0.05)
    optimizer.step()
    values = curve(
        kind="cosine-restarts", cycles=3, cycle_growth=2.0, final_ratio=0.05, warmup_fraction=0.3, cooldown_fraction=0.0
    )
    for place in range(1, 700):  # cycles of 100, 200 and 400 steps after a warm-up of 300
        theirs.step()
        if place not in (100, 300):  # torch has started the next cycle there, we end the last one
            assert values[299 + place] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
    assert [values[399], values[599], values[999]] == pytest.approx([0.05] * 3)


def test_peaks_of_restarts_fall() -> None:
    values = curve(kind="cosine-restarts", cycles=4, cycle_peak=0.5, final_ratio=0.0, warmup_fraction=0.0)
    assert [max(values[start : start + 250]) for start in (0, 250, 500, 750)] == pytest.approx(
        [1.0, 0.5, 0.25, 0.125], rel=1e-4
    )


def test_polynomial_and_inverse_square_root_equal_their_formulas() -> None:
    polynomial = curve(kind="polynomial", power=3.0, final_ratio=0.1, warmup_fraction=0.2)
    inverse = curve(kind="inverse-sqrt", warmup_fraction=0.1)
    for tokens in range(201, TOTAL + 1):
        assert polynomial[tokens - 1] == pytest.approx(0.1 + 0.9 * ((1000 - tokens) / 800) ** 3)
        assert inverse[tokens - 1] == pytest.approx(math.sqrt(100 / tokens))


def test_one_cycle_is_torchs() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=TOTAL + 1, pct_start=300 / 1000 + 1 / 1000, div_factor=25, final_div_factor=4,
        cycle_momentum=False,
    )  # fmt: skip
    optimizer.step()  # torch wants to see one first
    values = curve(kind="one-cycle", warmup_fraction=0.3, initial_ratio=0.04, final_ratio=0.01)
    for value in values:
        theirs.step()
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-3)


def test_steps_fall_after_each_milestone() -> None:
    values = curve(kind="step", milestones=[0.25, 0.5], step_factor=0.5, warmup_fraction=0.0)
    assert values == [1.0] * 250 + [0.5] * 250 + [0.25] * 500


@pytest.mark.parametrize("kind", KINDS)
def test_a_cool_down_falls_in_a_line_from_where_the_curve_ends(kind: str) -> None:
    values = curve(kind=kind, warmup_fraction=0.1, cooldown_fraction=0.2, cooldown_ratio=0.01)
    ended = values[799]
    for tokens in range(801, TOTAL + 1):
        assert values[tokens - 1] == pytest.approx(ended + (0.01 - ended) * (tokens - 800) / 200)
    assert values[-1] == pytest.approx(0.01)


def test_warm_up_may_start_above_zero() -> None:
    values = curve(kind="constant", warmup_fraction=0.5, initial_ratio=0.2)
    assert values[249] == pytest.approx(0.6)


def test_constant_stays() -> None:
    assert set(curve(kind="constant", warmup_fraction=0.0)) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "polynomial", "one-cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.003, 0.3])
def test_no_curve_jumps_starts_at_zero_or_leaves_its_bounds(kind: str, warmup: float) -> None:
    values = curve(kind=kind, warmup_fraction=warmup, final_ratio=0.1)
    assert all(0.0 < value <= 1.0 for value in values)
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= max(0.01, 1.6 / max(1, warmup * TOTAL)) + 1e-12


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_curves_rise_once_and_end_where_they_should(kind: str) -> None:
    values = curve(kind=kind, warmup_fraction=0.1, decay_fraction=0.5, final_ratio=0.25)
    assert values[0] == pytest.approx(0.01), "the first step has the learning rate of its end"
    assert values[99] == 1.0
    assert all(a < b for a, b in itertools.pairwise(values[:100]))
    assert all(a >= b for a, b in itertools.pairwise(values[99:]))
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.25)


def test_wsd_that_decays_right_after_warmup_does_not_jump() -> None:
    values = curve(kind="wsd", warmup_fraction=0.9, decay_fraction=0.5, final_ratio=0.0)
    assert values[899] == 1.0
    assert values[949] == pytest.approx(0.5)


def test_tokens_beyond_the_end_stay_at_the_end() -> None:
    schedule = ScheduleSection.model_validate({"steps": 1, "final_ratio": 0.3})
    assert learning_rate_factor(schedule, 2 * TOTAL, TOTAL) == pytest.approx(0.3)


def test_length_in_steps_tokens_and_epochs() -> None:
    def steps(**keys: float) -> int:
        return plan_length(
            ScheduleSection.model_validate(keys), tokens_per_step=100, samples_per_epoch=70, global_samples=8
        )

    assert steps(steps=7) == 7
    assert steps(tokens=101) == 2
    assert steps(tokens=200) == 2
    assert steps(epochs=1) == 9
    assert steps(epochs=0.5) == 5
    exact = ScheduleSection.model_validate({"epochs": 1.1})
    assert plan_length(exact, 1, samples_per_epoch=100, global_samples=11) == 10, "not 11 by a rounding error"


@pytest.mark.parametrize("kind", ["cosine", "linear", "one-cycle", "wsd"])
def test_a_cool_down_right_after_the_warm_up_falls_from_the_top(kind: str) -> None:
    values = curve(kind=kind, warmup_fraction=0.1, cooldown_fraction=0.9, cooldown_ratio=0.0)
    assert values[99] == pytest.approx(1.0)
    assert values[549] == pytest.approx(0.5)
    assert max(abs(after - before) for before, after in itertools.pairwise(values[100:])) < 2e-3
