"""The DeepSpeed JSON of typical recipes: as stored in golden/, taken by DeepSpeed itself, and made of known keys.

`UPDATE_GOLDEN=1 pytest tests/unit/plan` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plan_recipes import recipe

from ds_train.plan.deepspeed_json import OWNED, TUNABLE, bucket_elements
from ds_train.plan.deepspeed_keys import REFUSED, known_key
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.topology import Cluster

GOLDEN = Path(__file__).parent / "golden"
BATCH = {"batch.global_samples": 64, "batch.micro_samples": 4}
RECIPES: dict[str, tuple[dict[str, Any], Cluster]] = {
    "zero0_fp32": (
        {"parallel.zero_stage": 0, "precision.dtype": "fp32", "optimizer.clip_norm": 0.0}, Cluster(2, 2, "cpu")
    ),
    "zero1_bf16": ({}, Cluster(4, 2, "cpu")),
    "zero2_cpu_offload": (
        {"parallel.zero_stage": 2, "parallel.offload_optimizer": "cpu", "precision.gradient_dtype": "bf16"},
        Cluster(4, 4, "cuda"),
    ),
    "zero3_nvme": (
        {"parallel.zero_stage": 3, "parallel.offload_optimizer": "nvme", "parallel.offload_params": "nvme",
         "parallel.nvme_path": "/local_nvme", "deepspeed.aio.block_size": 4194304},
        Cluster(8, 8, "cuda", here=False),
    ),
    "zero3_zeropp": (
        {"parallel.zero_stage": 3, "parallel.quantized_weights": True, "parallel.quantized_gradients": True,
         "parallel.secondary_partition": 8},
        Cluster(16, 8, "cuda", here=False),
    ),
    "fp16": (
        {"parallel.zero_stage": 0, "precision.dtype": "fp16", "precision.initial_loss_scale_power": 12,
         "deepspeed.fp16.hysteresis": 4},
        Cluster(2, 2, "cuda"),
    ),
    "pipeline_tensor": ({"parallel.pipeline": 2, "parallel.tensor": 2}, Cluster(8, 8, "cuda", here=False)),
    "sequence_zero3": (
        {"parallel.sequence": 2, "parallel.zero_stage": 3, "precision.gradient_dtype": "bf16"},
        Cluster(8, 8, "cuda", here=False),
    ),
}  # fmt: skip


def plan(name: str) -> RunPlan:
    changes, cluster = RECIPES[name]
    return make_plan(recipe(BATCH | changes), cluster)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.mark.parametrize("name", RECIPES)
def test_json_is_the_golden_one(name: str) -> None:
    path, written = GOLDEN / f"{name}.json", plan(name).deepspeed_json
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    assert written == json.loads(path.read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_deepspeed_reads_it_as_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config_module = pytest.importorskip("deepspeed.runtime.config")
    planned, run = plan(name), recipe(BATCH | RECIPES[name][0])
    # All that its config class asks of torch.distributed is the number of ranks and this one's.
    monkeypatch.setattr(
        config_module, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: planned.cluster.ranks)
    )
    # As in training, DeepSpeed is told how many ranks average gradients.
    replicas = planned.layout.data * planned.layout.sequence
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: replicas)
    config = config_module.DeepSpeedConfig(planned.deepspeed_json, mpu)
    assert config.world_size == replicas
    assert config.train_batch_size == run.batch.global_samples * planned.layout.sequence
    assert config.gradient_accumulation_steps == planned.batch.accumulation
    assert config.zero_config.stage == planned.zero_stage
    assert config.gradient_clipping == run.optimizer.clip_norm
    assert config.bfloat16_config.enabled == (run.precision.dtype == "bf16")
    assert config.float16_config.enabled == (run.precision.dtype == "fp16")
    # With one micro-batch a step nothing is accumulated, and sharded gradients keep the model's format.
    alone = planned.batch.accumulation == 1 and planned.zero_stage >= 2 and run.parallel.offload_optimizer == "none"
    assert config.grad_accum_dtype == (run.precision.dtype if alone else run.precision.gradient_dtype)
    assert config.checkpoint_tag_validation_fail
    assert config.steps_per_print is None
    assert not config.timers_config.enabled
    assert config.optimizer_name is None
    assert config.scheduler_name is None
    for section, wanted in (
        (config.zero_config.offload_optimizer, run.parallel.offload_optimizer),
        (config.zero_config.offload_param, run.parallel.offload_params),
    ):
        assert (section.device if section else "none") == wanted


@pytest.mark.parametrize("name", RECIPES)
def test_every_written_key_is_one_that_deepspeed_reads(name: str) -> None:
    for key in leaves(plan(name).deepspeed_json):
        assert known_key(key), key


def test_every_written_key_is_either_the_plans_own_or_tunable() -> None:
    written = {key for name in RECIPES for key in leaves(plan(name).deepspeed_json)}
    raw = {"aio.block_size", "fp16.hysteresis"}
    refused = {"checkpoint.tag_validation", "zero_optimization.stage3_gather_16bit_weights_on_model_save"}
    owned = {key for key in written if key in OWNED or key in refused}
    assert written - raw - owned == TUNABLE
    assert not set(OWNED) & set(REFUSED)


def test_owned_recipe_keys_exist() -> None:
    from ds_train.config.load import known_keys

    named = {key for text in OWNED.values() for key in text.split(" and ")}
    assert named <= set(known_keys())


def test_stage_0_in_16_bits_runs_as_stage_1_and_says_so() -> None:
    planned = plan("fp16")
    assert planned.zero_stage == 1
    assert planned.deepspeed_json["zero_optimization"]["stage"] == 1
    assert "parallel.zero_stage=0 runs as 1" in planned.notes[0]
    assert plan("zero0_fp32").zero_stage == 0
    assert plan("zero0_fp32").notes == ()


def test_raw_keys_are_merged_on_top() -> None:
    run = recipe({"deepspeed": {"zero_optimization": {"round_robin_gradients": True, "contiguous_gradients": False}}})
    zero = make_plan(run, Cluster(2, 2, "cuda")).deepspeed_json["zero_optimization"]
    assert zero["round_robin_gradients"] is True
    assert zero["contiguous_gradients"] is False
    assert zero["stage"] == 1


@pytest.mark.parametrize("parameters", [None, 1, 123_457, 34_000_001, 7_000_000_001, 10**12])
def test_buckets_follow_the_model_and_are_even(parameters: int | None) -> None:
    bucket = bucket_elements(parameters)
    assert bucket % 2 == 0
    assert 1_000_000 <= bucket <= 200_000_000
    if parameters == 34_000_001:
        assert bucket < parameters / 4


def test_the_plan_is_plain_json() -> None:
    planned = plan("zero3_nvme")
    tree = planned.to_dict()
    assert json.loads(json.dumps(tree)) == tree
    assert tree["batch"] == {"global_samples": 64, "micro_samples": 4, "eval_micro_samples": 4, "accumulation": 2}
    assert tree["layout"] == {"pipe": 1, "data": 8, "sequence": 1, "tensor": 1}
    assert tree["size"]["parameters"] == planned.parameters
    assert tree["cluster"]["device"] == "cuda"
