"""What a run makes of its losses: a function of the numbers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from ds_train.config.health import HealthSection
from ds_train.engine.health import Health, LossScale, Verdict
from ds_train.engine.loop import StepResult


def result(step: int, loss: float, applied: bool = True, length: int = 8, patch: int = 1) -> StepResult:
    return StepResult(
        step=step, tokens=8 * step, samples=1, sequence_length=length, patch=patch, real_tokens=8, labels=7, loss=loss,
        lr=0.1, grad_norm=1.0 if applied else math.inf, applied=applied, seconds=0.1, measured={},
    )  # fmt: skip


def section(**keys: Any) -> HealthSection:
    return HealthSection(**{"spike_window": 20, "on_spike": "roll-back", **keys})


def see_all(health: Health, losses: Iterable[float], first: int = 1) -> list[Verdict]:
    return [health.see(result(step, loss)) for step, loss in enumerate(losses, first)]


def noise(seed: int, count: int) -> list[float]:
    return list(np.random.default_rng(seed).normal(3.0, 0.1, count))


@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_those_of_numpy_s_median_and_deviation(seed: int) -> None:
    losses = noise(seed, 200)
    losses[60], losses[100], losses[150] = 4.2, 9.0, 2.0  # the last one is below the others, and no spike
    health = Health(section(on_spike="note", spike_threshold=6.0))
    found = {step for step, verdict in enumerate(see_all(health, losses)) if verdict.lines}
    expected = set()
    for step in range(20, 200):
        last = np.array(losses[step - 20 : step])
        middle, rise = np.median(last), np.median(last[10:]) - np.median(last[:10])
        level = last - rise * np.arange(20) / 10
        deviation = max(1.4826 * np.median(np.abs(level - np.median(level))), 0.01 * middle)
        if (losses[step] - middle) / deviation > 6.0:
            expected.add(step)
    assert found == expected
    assert {60, 100} <= found


def test_a_loss_that_hardly_moves_has_no_outliers_within_percents() -> None:
    health = Health(section(spike_threshold=8.0))
    assert not any(verdict.lines for verdict in see_all(health, [3.0] * 30 + [3.2] + [3.0] * 5))
    assert see_all(health, [3.3], first=37)[0].action == "roll-back"


def test_a_falling_loss_hides_no_spike() -> None:
    falling = [6.0 * 0.97**step + noise for step, noise in enumerate(np.random.default_rng(0).normal(0.0, 0.02, 80))]
    assert not any(verdict.lines for verdict in see_all(Health(section()), falling))
    # Within the losses of the window, and far off their trend.
    verdicts = see_all(Health(section()), [*falling[:60], falling[39]])
    assert verdicts[-1].action == "roll-back"


def test_a_spike_is_as_many_outliers_in_a_row_as_the_recipe_says() -> None:
    health = Health(section(spike_steps=3))
    verdicts = see_all(health, [*noise(1, 30), 6.0, 6.0, 3.0, 6.0, 6.0, 6.0, 6.0])
    actions = [verdict.action for verdict in verdicts]
    assert actions == ["go-on"] * 35 + ["roll-back", "go-on"]
    assert verdicts[35].onset == 34
    assert verdicts[35].lines[0]["z"] > 8.0


def test_going_back_counts_until_the_limit() -> None:
    health = Health(section(max_roll_backs=2))
    see_all(health, noise(2, 25))
    saved = json.loads(json.dumps(health.record()))
    for _ in range(2):
        assert see_all(health, [9.0], first=26)[0].action == "roll-back"
        health.go_back(saved)
    (verdict,) = see_all(health, [9.0], first=26)
    assert (verdict.action, verdict.lines[0]["event"], verdict.lines[0]["roll_back"]) == ("go-on", "spike", False)
    assert "2 roll-backs" in verdict.words[0]


def test_samples_of_another_shape_are_compared_with_their_own() -> None:
    health = Health(section())
    see_all(health, noise(3, 30))
    assert not any(health.see(result(31 + step, 6.0, length=16)).lines for step in range(20))
    assert health.see(result(60, 9.0, length=16)).action == "roll-back"


def test_a_resumed_run_judges_as_the_unbroken_one() -> None:
    losses = [*noise(4, 40), 8.0, *noise(5, 20), 8.0]
    whole = Health(section())
    expected = see_all(whole, losses)
    for cut in (10, 30, 41, 55):
        first = Health(section())
        see_all(first, losses[:cut])
        resumed = Health(section(), json.loads(json.dumps(first.record())))
        assert see_all(resumed, losses[cut:], first=cut + 1) == expected[cut:]


def test_steps_that_are_not_finite_are_counted_and_end_the_run() -> None:
    health = Health(section(max_nonfinite_steps=3))
    see_all(health, noise(6, 25))
    verdicts = [
        health.see(result(26, math.nan, False)),
        health.see(result(27, 3.0, False)),
        health.see(result(28, 3.0)),
    ]
    assert [verdict.action for verdict in verdicts] == ["go-on"] * 3
    assert [verdict.lines[0]["cause"] for verdict in verdicts[:2]] == ["loss", "gradient"]
    assert [verdict.lines[0]["in_a_row"] for verdict in verdicts[:2]] == [1, 2]
    ending = [health.see(result(step, math.nan, False)) for step in (29, 30, 31)]
    assert [verdict.action for verdict in ending] == ["go-on", "go-on", "stop"]
    assert ending[-1].lines[0]["skipped"] == 5
    assert health.why_stopped(result(31, math.nan, False), None)[0] == "non-finite"


def test_overflows_of_fp16_count_when_the_scale_is_at_its_end() -> None:
    health = Health(section(max_nonfinite_steps=2))
    see_all(health, noise(7, 25))
    for step in range(26, 46):  # the scale falls from 2 ** 16 to 1
        verdict = health.see(result(step, 3.0, False), LossScale(2.0 ** (46 - step), can_fall=True))
        assert (verdict.action, verdict.lines[0]["cause"]) == ("go-on", "loss-scale")
    lowest = LossScale(1.0, can_fall=False)
    assert health.see(result(46, 3.0, False), lowest).action == "go-on"
    assert health.see(result(47, 3.0, False), lowest).action == "stop"
    assert health.why_stopped(result(47, 3.0, False), lowest)[0] == "loss-scale-collapse"
    # The same end, but the loss has left its range: the scale isn't what is wrong.
    assert health.why_stopped(result(47, 9.0, False), lowest)[0] == "divergence"
    assert health.why_stopped(result(47, math.nan, False), lowest)[0] == "non-finite"


def test_a_leap_before_the_end_is_divergence() -> None:
    health = Health(section(max_nonfinite_steps=1, on_spike="note"))
    see_all(health, [*noise(8, 25), 30.0])
    assert health.see(result(27, math.inf, False)).action == "stop"
    assert health.why_stopped(result(27, math.inf, False), None)[0] == "divergence"


def test_ignored_spikes_are_not_reported() -> None:
    health = Health(section(on_spike="ignore"))
    assert not any(verdict.lines for verdict in see_all(health, [*noise(9, 25), 30.0]))
