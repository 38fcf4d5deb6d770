"""What is swapped to a disk lies in a folder of the run's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from ds_train.config import RunConfig
from ds_train.config.load import validate
from ds_train.engine.disk import clear_disk, own_disk
from ds_train.engine.ranks import RankInfo
from ds_train.errors import UserError


def recipe(disk: Path, root: str, name: str = "one", **parallel: str) -> RunConfig:
    layout = {"zero_stage": 3, "nvme_path": str(disk), "offload_params": "nvme"} | parallel
    return validate({
        "name": name, "run_root": root, "model": {"arch": "llama"}, "schedule": {"steps": 1}, "parallel": layout,
    })  # fmt: skip


def config(disk: Path) -> dict[str, Any]:
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme", "nvme_path": str(disk)}}
    return {"zero_optimization": zero}


def test_no_two_runs_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: True)
    given = config(tmp_path)
    before = copy.deepcopy(given)
    places = set()
    for run in (recipe(tmp_path, "runs"), recipe(tmp_path, "runs", "two"), recipe(tmp_path, "elsewhere")):
        zero = own_disk(run, given)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu"}
        place = Path(zero["offload_param"]["nvme_path"])
        assert place.parent == tmp_path
        places.add(place)
        (place / "zero_stage_3").mkdir(parents=True)
    assert given == before
    assert len(places) == 3
    again = own_disk(recipe(tmp_path, str(Path("runs").resolve())), given)
    assert Path(again["zero_optimization"]["offload_param"]["nvme_path"]) in places
    clear_disk(recipe(tmp_path, "runs"), RankInfo(1, 2, 1, 2, "cpu"))
    assert {*tmp_path.iterdir()} == places
    clear_disk(recipe(tmp_path, "runs"), RankInfo(0, 2, 0, 2, "cpu"))
    assert len({*tmp_path.iterdir()} & places) == 2


def test_without_libaio_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: False)
    with pytest.raises(UserError, match=r"parallel\.nvme_path: the headers of libaio.*Fix: install libaio-dev"):
        own_disk(recipe(tmp_path, "runs"), config(tmp_path))
    in_memory = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert own_disk(recipe(tmp_path, "runs", offload_params="cpu"), in_memory) == in_memory
