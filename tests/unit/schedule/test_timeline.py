"""The clock against a loop that walks the run step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from ds_train.config import RunConfig
from ds_train.schedule.curves import recipe_curves
from ds_train.schedule.learning_rate import learning_rate_factor
from ds_train.schedule.timeline import StepShape, cut_timeline, make_timeline

Recipe = Callable[..., RunConfig]
WINDOW, GLOBAL, STEPS = 48, 6, 100
TOTAL = WINDOW * GLOBAL * STEPS


def run_with(recipe: Recipe, **curriculum: Any) -> RunConfig:
    return recipe(
        data={"sequence_length": WINDOW},
        batch={"global_samples": GLOBAL},
        schedule={"steps": None, "tokens": TOTAL},
        curriculum=curriculum,
    )


def wanted_length(kind: str, place: float) -> float:
    progress = min(1.0, place / 0.5)
    return 8 + (WINDOW - 8) * (math.sqrt(progress) if kind == "root" else progress)


@pytest.mark.parametrize("kind", ["linear", "root"])
@pytest.mark.parametrize("keep_tokens", [True, False])
@pytest.mark.parametrize("how", ["repack", "truncate"])
def test_each_step_has_the_length_of_the_clock_at_its_start(
    recipe: Recipe, kind: str, keep_tokens: bool, how: str
) -> None:
    run = run_with(
        recipe, kind=kind, start_length=8, fraction=0.5, how=how, keep_tokens=keep_tokens, multiple=8, root=2.0
    )
    timeline = cut_timeline(run, TOTAL)
    divisors = [8, 12, 16, 24, 48]
    allowed = divisors if keep_tokens or how == "repack" else [8, 16, 24, 32, 40, 48]
    tokens = taken = 0
    for step in range(timeline.steps):
        shape = timeline.at(step)
        assert (shape.step, shape.before) == (step, tokens)
        length = max(length for length in allowed if length <= wanted_length(kind, tokens / TOTAL) + 1e-9)
        if how == "truncate" or keep_tokens:  # repacked steps of fewer tokens end their windows first
            assert shape.length == length
        assert shape.samples == GLOBAL * (WINDOW // shape.length if keep_tokens else 1)
        if how == "repack":
            assert shape.first * shape.length == tokens, "the place in the data is the clock"
        else:
            assert shape.first == taken
        taken += shape.samples
        tokens = shape.after
        if keep_tokens:
            assert tokens == (step + 1) * WINDOW * GLOBAL
    assert timeline.tokens_after(timeline.steps) == tokens >= TOTAL
    assert tokens - TOTAL < WINDOW * GLOBAL
    assert timeline.tokens_after(0) == 0


def test_repacked_windows_end_before_the_length_changes(recipe: Recipe) -> None:
    run = run_with(recipe, kind="linear", start_length=8, how="repack", keep_tokens=False)
    timeline = cut_timeline(run, TOTAL)
    assert len(timeline.stretches) == 5
    assert all(stretch.before % WINDOW == 0 for stretch in timeline.stretches)


def test_discrete_lengths_change_where_they_should(recipe: Recipe) -> None:
    run = run_with(recipe, kind="discrete", lengths=[8, 24], until=[0.25, 0.5])
    shapes = [(stretch.step, stretch.length, stretch.samples) for stretch in cut_timeline(run, TOTAL).stretches]
    assert shapes == [(0, 8, 36), (25, 24, 12), (50, 48, 6)]


def test_a_curriculum_leaves_the_learning_rate_over_tokens_as_it_was(recipe: Recipe) -> None:
    plain = make_timeline(run_with(recipe), 10)
    run = run_with(recipe, kind="root", start_length=8, how="truncate", keep_tokens=False)
    other = make_timeline(run, 10)
    assert other.steps > plain.steps
    assert other.total_tokens == plain.total_tokens
    last = other.at(other.steps - 1)
    assert learning_rate_factor(run.schedule, last.after, other.total_tokens) == pytest.approx(run.schedule.final_ratio)


def test_the_curves_of_a_curriculum_are_drawn(recipe: Recipe) -> None:
    found = recipe_curves(run_with(recipe, kind="discrete", lengths=[8], until=[0.5]), points=10)
    curves = {curve.name: curve.values for curve in found.curves}
    assert curves["tokens per sample"] == (8.0,) * 5 + (48.0,) * 5
    assert curves["samples per step"] == (36.0,) * 5 + (6.0,) * 5
    assert found.tokens[-1] == TOTAL


def windows_of(shape: StepShape) -> set[tuple[int, int]]:
    """(window, part of it) of each sample of a step."""
    return {divmod(sample, shape.parts) for sample in range(shape.first, shape.first + shape.samples)}


@pytest.mark.parametrize("how", ["repack", "truncate"])
def test_what_a_roll_back_leaves_out_never_comes_again(recipe: Recipe, how: str) -> None:
    curriculum = {"kind": "discrete", "lengths": [8, 16], "until": [0.3, 0.6], "how": how}
    run = recipe(
        data={"sequence_length": 64}, batch={"global_samples": 6}, curriculum=curriculum,
        schedule={"steps": None, "tokens": 64 * 6 * 40},
    )  # fmt: skip
    plain = cut_timeline(run, 64 * 6 * 40)
    once = plain.skipping(20, 27)
    twice = once.skipping(24, 31)
    far_back = twice.skipping(10, 33)  # where the checkpoints in between were damaged
    gone: set[int] = set()
    for old, new, first, stop in ((plain, once, 20, 27), (once, twice, 24, 31), (twice, far_back, 10, 33)):
        gone |= {window for step in range(first, stop) for window, _ in windows_of(old.at(step))}
        seen: list[tuple[int, int]] = []
        for step in range(new.steps):
            shape, before = new.at(step), plain.at(step)
            assert (shape.before, shape.length, shape.samples) == (before.before, before.length, before.samples)
            if step < first:
                assert shape == old.at(step)
            else:
                assert gone.isdisjoint(window for window, _ in windows_of(shape))
            seen += windows_of(shape)
        assert len(seen) == len(set(seen)), "no sample comes twice"
        came = {window for window, _ in seen}
        assert came | gone == set(range(max(came) + 1)), "no other window is left out"
    assert [skip.step for skip in far_back.skips] == [20, 24, 10]


def test_the_place_in_the_data_tells_another_length_of_the_run(recipe: Recipe) -> None:
    keys = {"kind": "discrete", "lengths": [16], "until": [0.5], "how": "truncate"}
    timeline = cut_timeline(run_with(recipe, **keys), TOTAL)
    longer = cut_timeline(run_with(recipe, **keys), 2 * TOTAL)
    step = 60
    assert timeline.tokens_after(step) == longer.tokens_after(step)
    assert timeline.samples_after(step) == timeline.at(step).first
    assert timeline.samples_after(step) != longer.samples_after(step)
    assert timeline.skipping(3, 5).samples_after(step) == timeline.samples_after(step)
