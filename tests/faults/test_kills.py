"""Ranks that are killed anywhere: the run is started again, and at its end no bit of any loss is another one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from place import Act, Place, act

pytestmark = pytest.mark.parity

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero0": ({"zero_stage": 0}, "fp32"),
    "zero1": ({"zero_stage": 1}, "bf16"),
    "zero2": ({"zero_stage": 2}, "fp32"),
    "zero3": ({"zero_stage": 3}, "bf16"),
    "offload": ({"zero_stage": 2, "offload_optimizer": "cpu"}, "bf16"),
    "pipeline": ({"pipeline": 2}, "fp32"),
    "tensor": ({"tensor": 2, "zero_stage": 1}, "fp32"),
}
POINTS = {
    "step": "ds_train.engine.loop:update",
    "save": "ds_train.checkpoint.native:Saver._write",
    "evaluation": "ds_train.engine.loop:evaluate",
    "resume": "ds_train.checkpoint.native:load",
    "anywhere": "ds_train.engine.job:train",
}
KILLS, STEPS = 20, 200
SAVE_PHASES = [
    act(0, "ds_train.checkpoint.native:Saver._prepare"),
    act(1, "ds_train.checkpoint.native:write_fragments"),
    act(0, "ds_train.checkpoint.native:write_fragments", when="after"),
    act(1, "ds_train.checkpoint.native:write_fragments", when="after"),
    act(0, "ds_train.checkpoint.native:write_json"),
    act(0, "ds_train.checkpoint.native:write_manifest"),
    act(0, "ds_train.checkpoint.manifest:write_text", call=2),
    act(0, "ds_train.checkpoint.native:make_durable", call=1),
    act(0, "ds_train.checkpoint.native:make_durable", call=2),
    act(0, "ds_train.checkpoint.native:write_text"),
    act(0, "ds_train.checkpoint.native:write_text", when="after"),
    act(0, "shutil:rmtree", call=1),
    act(0, "shutil:rmtree", call=2),
    act(0, "shutil:rmtree", call=2, when="during", delay=1e-4),
    act(0, "ds_train.checkpoint.native:Saver._commit", when="after"),
]


def kills(chance: random.Random, first: bool) -> list[Act]:
    """A random point of a run, for one rank or for both a moment apart. The first leaves something to resume."""
    phase = "step" if first else chance.choice(list(POINTS))
    call = chance.randint(3, 6) if phase == "step" else 1
    longest = 3.0 if phase == "anywhere" else 0.08
    ranks = chance.choice([[0], [1], [0, 1]])
    return [act(rank, POINTS[phase], when="during", call=call, delay=chance.uniform(0, longest)) for rank in ranks]


def check_killed_often(place: Place, layout: str, strikes: list[list[Act]], steps: int) -> None:
    """Strike one launch of a run after the other; then let it end, and compare it with a run that nothing struck."""
    parallel, dtype = LAYOUTS[layout]
    place.train(place.recipe("whole", steps, parallel, dtype)).check()
    recipe = place.recipe("broken", steps, parallel, dtype)
    for acts in strikes:
        ended = place.train(recipe, acts=acts)
        struck = [ended.codes[one["rank"]] for one in acts]
        assert -9 in struck, f"{acts}: {ended.codes}\n{ended.outputs[0][-3000:]}\n{ended.outputs[1][-3000:]}"
    place.train(recipe).check()
    assert place.history("broken") == place.history("whole")
    assert place.steps("broken") == place.steps("whole")
    names = {path.name for path in (place.run("broken") / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step-{step:08d}" for step in place.steps("whole"))}, "leftovers are removed"


def test_killed_in_a_step_in_a_save_and_in_resume(place: Place) -> None:
    strikes = [
        [act(1, POINTS["step"], when="during", call=5)],
        [act(0, POINTS["resume"], when="during", delay=0.01)],
        [act(0, "ds_train.checkpoint.native:write_manifest"), act(1, POINTS["save"], when="during", delay=0.01)],
    ]
    check_killed_often(place, "zero2", strikes, steps=12)


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_points(place: Place, layout: str) -> None:
    chance = random.Random(f"killed {layout}")
    check_killed_often(place, layout, [kills(chance, first=not index) for index in range(KILLS)], STEPS)


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["zero3", "pipeline"])
def test_killed_in_each_phase_of_a_save(place: Place, layout: str) -> None:
    check_killed_often(place, layout, [[phase] for phase in SAVE_PHASES], steps=40)
