"""What a recipe leaves to the planner is chosen before anything is built, by every command that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ds_train.config import RunConfig
from ds_train.engine import prune_once
from ds_train.engine.ranks import RankInfo
from ds_train.plan.search import auto_fields


def test_pruning_at_once_settles_what_says_auto(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    for name in ("settle", "meet", "quiet_libraries", "make_run_folder"):
        monkeypatch.setattr(prune_once, name, lambda *_: None)
    monkeypatch.setattr(prune_once, "on_main_first", lambda info, work: work())
    monkeypatch.setattr(prune_once, "_prune", lambda *arguments: given.extend(arguments))
    run = recipe(compress={"prune": {"ffn": 0.5}}, parallel={"zero_stage": "auto", "offload_optimizer": "auto"})
    prune_once.prune_once(run, RankInfo(0, 1, 0, 1, "cpu"))
    used, plan, *_ = given
    assert auto_fields(run)
    assert auto_fields(used) == []
    assert plan.run == used
