"""A checkpoint goes on under a recipe that computes the same, and under no other."""

from __future__ import annotations

import json

import pytest

from ds_train.checkpoint.native import TrainState
from ds_train.checkpoint.same_run import check_resumable, said_changes
from ds_train.config.load import validate
from ds_train.errors import UserError


def test_what_may_and_what_may_not_change_on_resume() -> None:
    recipe = {
        "seed": 1,
        "data": {"source": "text", "workers": 1},
        "track": {"wandb": "off"},
        "optimizer": {"betas": [0.9, 0.95]},
    }
    saved = TrainState(5, 50, json.loads(json.dumps(recipe)), {"ranks": 2}, {}, "abc")
    check_resumable(saved, recipe | {"track": {"wandb": "online"}}, "abc")
    check_resumable(saved, recipe | {"data": {"source": "text", "workers": 4}}, "abc")
    check_resumable(saved, recipe | {"optimizer": {"betas": (0.9, 0.95)}}, "abc")
    later = {"compress": {"prune": {"parallel": {"tensor": 2}}}}
    check_resumable(saved, recipe | later, "abc")
    moved = recipe | {"data": {"source": "text", "workers": 1, "path": "/elsewhere"}}
    check_resumable(saved, moved, "abc")
    with pytest.raises(UserError, match=r"data\.path=/elsewhere: the checkpoint was made with null"):
        check_resumable(saved, moved, "xyz")
    with pytest.raises(UserError, match=r"(?s)data.source=stdlib.*made with text.*seed=2"):
        check_resumable(saved, recipe | {"seed": 2, "data": {"source": "stdlib"}}, "abc")
    with pytest.raises(UserError, match="data has changed"):
        check_resumable(saved, recipe, "xyz")


def test_what_changes_the_losses_from_here_on_is_said() -> None:
    recipe = {"schedule": {"steps": 100, "kind": "cosine"}, "track": {"wandb": "off"}, "batch": {"micro_samples": 2}}
    later = {"schedule": {"steps": 200, "kind": "cosine"}, "track": {"wandb": "on"}, "batch": {"micro_samples": 1}}
    assert said_changes(recipe, recipe) == []
    assert said_changes(recipe, later) == [
        "batch.micro_samples was 2 and is now 1", "schedule.steps was 100 and is now 200",
    ]  # fmt: skip


def test_a_key_that_came_with_a_later_version_had_its_default_before() -> None:
    now = validate({"model": {"arch": "llama"}, "schedule": {"steps": 9}, "compress": {"prune": {"ffn": {0: 0.5}}}})
    recipe = now.model_dump(mode="json")
    before = json.loads(json.dumps(recipe))
    del before["optimizer"]["decay_all"], before["layer_drop"], before["model"]["keep_layers"]
    del before["schedule"]["kind"]
    saved = TrainState(5, 50, before, {"ranks": 2}, {}, "abc")
    check_resumable(saved, recipe, "abc")
    assert said_changes(before, recipe) == []
    recipe["optimizer"]["decay_all"] = True
    with pytest.raises(UserError, match=r"optimizer\.decay_all=true: the checkpoint was made with false"):
        check_resumable(saved, recipe, "abc")
