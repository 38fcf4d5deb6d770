"""What a run that goes on from a checkpoint takes over from it: all of its own, and of another run what trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ds_train.checkpoint.manifest import write_json
from ds_train.checkpoint.native import STATE, TrainState, of_step
from ds_train.config import RunConfig
from ds_train.engine.job import _taken_over

BEST = {"by": "loss", "step": 4, "value": 2.5, "worse": 1}
Recipe = Callable[..., RunConfig]


def saved(folder: Path, step: int, name: str, best: dict[str, object] = BEST) -> Path:
    """What is read of a checkpoint of run `name`."""
    state = TrainState(step, step * 10, {"name": name}, {}, {}, "abc", wandb_id="w1", skips=[{"step": 1, "windows": 2}])
    path = of_step(folder, step)
    path.mkdir(parents=True)
    write_json(path / STATE, asdict(replace(state, best=best)))
    return path


@pytest.fixture
def run(recipe: Recipe) -> RunConfig:
    return recipe(name="mine")


def test_a_run_goes_on_with_its_own_best(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    state = _taken_over(run, folder, saved(folder / "checkpoints", 6, "as it was called before"))
    assert (state.best, state.wandb_id) == (BEST, "w1")


@pytest.mark.parametrize("own", [None, {**BEST, "value": 2.0}])
def test_another_runs_best_is_left_to_it(run: RunConfig, tmp_path: Path, own: dict[str, object] | None) -> None:
    folder = tmp_path / "runs" / "mine"
    if own is not None:  # a best evaluation of this run, of the same step
        saved(folder / "checkpoints", 4, "mine", own)
    state = _taken_over(run, folder, saved(tmp_path / "runs" / "other" / "checkpoints", 6, "other"))
    assert (state.best, state.wandb_id) == ({}, None)
    assert (state.step, state.skips) == (6, [{"step": 1, "windows": 2}])


def test_a_checkpoint_that_was_written_again_elsewhere_is_the_runs_own(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    again = saved(tmp_path / "resharded", 6, "mine")
    assert _taken_over(run, folder, again).best == {}, "the best one hasn't come along"
    saved(folder / "checkpoints", 4, "mine")
    state = _taken_over(run, folder, again)
    assert (state.best, state.wandb_id) == (BEST, "w1")
