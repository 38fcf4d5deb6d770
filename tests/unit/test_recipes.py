"""Every recipe in ds_configs/ loads, plans, and is accepted by DeepSpeed's own config class."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_train.config import load
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster

RECIPES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_recipe(path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(path)
    assert run.name == path.stem
    cluster = Cluster(ranks, ranks, "cuda", here=False)
    plan = make_plan(run, cluster)
    assert plan.batch.micro_samples * plan.batch.accumulation * ranks == run.batch.global_samples
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.config as config_module

    # It asks torch.distributed for the number of ranks; none is started here.
    dist = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: ranks)
    monkeypatch.setattr(config_module, "dist", dist)
    accepted = config_module.DeepSpeedConfig(plan.deepspeed_json)
    assert accepted.train_batch_size == run.batch.global_samples
    assert accepted.zero_config.stage == plan.zero_stage
