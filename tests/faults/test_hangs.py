"""Ranks that hang, stop, or have something else than the others: named, and nobody waits for hours."""

from __future__ import annotations

import time

import pytest
from place import Place, act

pytestmark = pytest.mark.parity

UPDATE = "ds_train.engine.loop:update"
QUICK = {"faults": {"late_floor_seconds": 4, "first_step_seconds": 60}}


def test_a_rank_that_hangs_is_named_and_the_run_ends(place: Place) -> None:
    recipe = place.recipe("late", 20, {"zero_stage": 2}, **QUICK)
    started = time.monotonic()
    ended = place.train(recipe, acts=[act(1, UPDATE, "hang", call=8)])
    assert ended.codes == [76, 76], ended.outputs
    assert time.monotonic() - started < 60
    assert "late is rank 1 on " in ended.outputs[0]
    assert "at step 8, in strike (tests/faults/struck.py:" in ended.outputs[0]
    (fault,) = place.records("late", "fault")
    assert fault["step"] == 7
    for rank in range(2):
        stacks = (place.run("late") / "faults" / f"rank-{rank:05d}.txt").read_text()
        assert "step 8 has taken" in stacks
        assert "gloo:all_reduce in 0 default_pg" in stacks
        assert "in update" in stacks or "in train_steps" in stacks
    place.train(recipe).check()
    assert place.records("late", "train")[-1]["step"] == 20


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_hangs_is_named(place: Place, workers: int) -> None:
    recipe = place.recipe("late", 20, {"zero_stage": 2}, **QUICK, data={"workers": workers})
    ended = place.train(recipe, acts=[act(1, "ds_train.data.batches:Batches.take", "hang", call=8)])
    assert ended.codes == [76, 76], ended.outputs
    assert "late is rank 1 on " in ended.outputs[0]
    assert "at step 8, in strike (tests/faults/struck.py:" in ended.outputs[0]
    words = "".join(ended.outputs)
    assert "loading the data of step 8 from " in words or "step 8 has taken" in words
    place.train(recipe).check()
    assert place.records("late", "train")[-1]["step"] == 20


@pytest.mark.faults
def test_held_out_samples_that_hang_are_named(place: Place) -> None:
    recipe = place.recipe("late", 20, {"zero_stage": 2}, **QUICK, data={"workers": 0})
    # Two micro-batches a step, and an evaluation after three.
    ended = place.train(recipe, acts=[act(0, "ds_train.data.batches:Collator.__call__", "hang", call=7)])
    assert ended.codes == [76, 76], ended.outputs
    assert "loading the data of step 3 from " in ended.outputs[0]
    assert "validation.tokens has taken" in ended.outputs[0]
    assert "late is rank 0 on " in ended.outputs[0]


@pytest.mark.faults
def test_a_source_that_hangs_while_it_is_read_is_named(place: Place) -> None:
    recipe = place.recipe("late", 20, {"zero_stage": 2}, faults={"first_step_seconds": 3})
    ended = place.train(recipe, acts=[act(0, "ds_train.data.sources:_read_text", "hang", call=8)])
    assert ended.codes[0] == 76, ended.outputs
    assert f"nothing has come from {place.folder}/text/07.txt for 3 s" in ended.outputs[0]
    assert not (place.run("late") / "metrics.jsonl").exists()
    place.train(recipe).check()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named(place: Place, rank: int) -> None:
    recipe = place.recipe("stopped", 20, {"zero_stage": 2}, **QUICK)
    ended = place.train(recipe, acts=[act(rank, UPDATE, "SIGSTOP", call=8)], settle_s=5)
    assert ended.codes[rank] == -9  # the test's launcher did it
    assert ended.codes[1 - rank] == 76
    assert f"rank {rank} gives no answer" in ended.outputs[1 - rank]


@pytest.mark.faults
@pytest.mark.parametrize("where", ["ds_train.engine.loop:evaluate", "ds_train.checkpoint.native:Saver._write"])
def test_a_rank_that_is_stopped_between_steps_is_named(place: Place, where: str) -> None:
    ended = place.train(
        place.recipe("stopped", 20, {"zero_stage": 2}, **QUICK), acts=[act(1, where, "SIGSTOP")], settle_s=5
    )
    assert ended.codes == [76, -9]
    assert "rank 1 gives no answer" in ended.outputs[0]


@pytest.mark.faults
@pytest.mark.parametrize(
    "where",
    ["ds_train.engine.loop:evaluate", "ds_train.checkpoint.native:Saver._write", "ds_train.checkpoint.hf:export"],
)
def test_what_is_no_step_may_take_its_time(place: Place, where: str) -> None:
    recipe = place.recipe("slow", 4, {"zero_stage": 2}, **QUICK, checkpoint={"export": True})
    place.train(recipe, acts=[act(1, where, "SIGCONT", delay=9)]).check()
    assert place.records("slow", "fault") == []


@pytest.mark.faults
def test_the_first_step_may_take_its_time(place: Place) -> None:
    recipe = place.recipe("slow", 4, {"zero_stage": 2}, **QUICK)
    place.train(recipe, acts=[act(1, UPDATE, "SIGCONT", delay=9)]).check()


@pytest.mark.faults
def test_a_killed_rank_ends_the_others(place: Place) -> None:
    started = time.monotonic()
    ended = place.train(
        place.recipe("killed", 20, {"zero_stage": 2}, **QUICK), acts=[act(0, UPDATE, call=8)], settle_s=30
    )
    assert ended.codes[0] == -9
    assert ended.codes[1] in (1, 76)
    assert time.monotonic() - started < 60


@pytest.mark.faults
@pytest.mark.parametrize("layout", [{"zero_stage": 0}, {"zero_stage": 2}, {"pipeline": 2}], ids=str)
def test_a_rank_with_another_weight_is_named(place: Place, layout: dict[str, int]) -> None:
    spoil = act(1, "ds_train.engine.build:assemble", "spoil", "after")
    ended = place.train(place.recipe("odd", 4, layout), acts=[spoil])
    assert ended.codes[0] == 2, ended.outputs[0]
    assert "the parameter transformer.wte.weight (all stages, all tensor ranks) of rank 1 on" in ended.outputs[0]


@pytest.mark.faults
def test_a_rank_with_another_recipe_is_named(place: Place) -> None:
    ended = place.train(place.recipe("odd", 4, {"zero_stage": 2}), own_overrides={1: ["optimizer.lr=3e-3"]})
    assert ended.codes[0] == 2, ended.outputs[0]
    assert "recipe.optimizer.lr of rank 1 on" in ended.outputs[0]
    assert "0.003 instead of 0.01" in ended.outputs[0]
