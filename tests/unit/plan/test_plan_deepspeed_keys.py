"""Raw `deepspeed:` keys are checked against DeepSpeed's own source."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from ds_train.plan.deepspeed_json import OWNED
from ds_train.plan.deepspeed_keys import (
    _SECTION_MODELS,
    REFUSED,
    check_raw,
    known_key,
    removed_keys,
    section_fields,
    top_level_keys,
)

WRONG = [
    ({"zero_optimizaton": {}}, "deepspeed.zero_optimizaton", "`deepspeed.zero_optimization`"),
    ({"zero_optimization": {"sub_group_sise": 1}}, "deepspeed.zero_optimization.sub_group_sise", "sub_group_size"),
    ({"zero_optimization": {"prefetch_bucket_size": 1}}, "", "`deepspeed.zero_optimization.stage3_prefetch_"),
    ({"zero_optimization": {"offload_optimizer": {"buffer_cout": 1}}}, "", "offload_optimizer.buffer_count`"),
    ({"stage": 3}, "deepspeed.stage", "`deepspeed.zero_optimization.stage`"),
    ({"aio": {"blok_size": 1}}, "deepspeed.aio.blok_size", "`deepspeed.aio.block_size`"),
    ({"flops_profiler": {"enable": True}}, "deepspeed.flops_profiler.enable", "flops_profiler.enabled"),
    ({"checkpoint": {"writer": {"typ": "fast"}}}, "deepspeed.checkpoint.writer.typ", "checkpoint.writer.type"),
    ({"timers": {"throughputs": {}}}, "deepspeed.timers.throughputs", "timers.throughput"),
    ({"nothing_like_it": 1}, "deepspeed.nothing_like_it", "leave it out"),
    ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage", "set parallel.zero_stage instead"),
    ({"zero_optimization": {"cpu_offload": True}}, "", "set parallel.offload_optimizer instead"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "", "set parallel.offload_params instead"),
    ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled", "set precision.dtype instead"),
    ({"bfloat16": {"enabled": True}}, "deepspeed.bfloat16", "set precision.dtype instead"),
    ({"optimizer": {"type": "OneBitAdam", "params": {}}}, "deepspeed.optimizer", "set optimizer.kind instead"),
    ({"train_batch_size": "auto"}, "deepspeed.train_batch_size", "set batch.global_samples instead"),
    ({"zero_optimization": True}, "deepspeed.zero_optimization", "write keys under it"),
    ({"aio": None}, "deepspeed.aio", "write keys under it"),
    ({"checkpoint": {"writer": 3}}, "deepspeed.checkpoint.writer", "write keys under it"),
    ({"steps_per_print": "auto"}, "deepspeed.steps_per_print", "write a value"),
    ({"zero_optimization": {"leaf_module": {"names": "auto"}}}, "", "write a value"),
    ({"zero_optimization": {"sub_group_size": "many"}}, "deepspeed.zero_optimization.sub_group_size", "takes int"),
    ({"zero_optimization": {"sub_group_size": 1.5}}, "deepspeed.zero_optimization.sub_group_size", "takes int"),
    ({"zero_optimization": {"round_robin_gradients": 1}}, "", "takes bool"),
    ({"compression_training": {}}, "deepspeed.compression_training", "removed"),
    ({"elasticity": {"enabled": True}}, "deepspeed.elasticity", "removed"),
    ({"amp": {"enabled": True}}, "deepspeed.amp", "removed"),
    ({"quantize_training": {}}, "deepspeed.quantize_training", "removed"),
    ({"progressive_layer_drop": {}}, "deepspeed.progressive_layer_drop", "removed"),
    ({"sparse_attention": {}}, "deepspeed.sparse_attention", "removed"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "deepspeed.zero_optimization.mics_shard_size", "removed"),
    ({"tensorboard": {"enabled": True}}, "deepspeed.tensorboard", "track.wandb"),
    ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op", "mean loss"),
    ({"zero_optimization": {"zenflow": {}}}, "deepspeed.zero_optimization.zenflow", "DeepSpeedCPUAdam"),
]  # fmt: skip

RIGHT: list[dict[str, Any]] = [
    {},
    {
        "zero_optimization": {
            "sub_group_size": 1e8,
            "round_robin_gradients": True,
            "offload_optimizer": {"buffer_count": 5},
        }
    },
    {"aio": {"block_size": 1048576, "queue_depth": 8}, "comms_logger": {"enabled": True}, "memory_breakdown": True},
    {"data_types": {"keep_in_fp32_modules": "auto"}, "communication_data_type": "fp32", "steps_per_print": 10},
    {"flops_profiler": {"enabled": True, "profile_step": 3}, "timers": {"throughput": {"enabled": True}}},
    {"checkpoint": {"writer": {"type": "FAST"}, "parallel_write": {"pipeline_stage": False}}},
]


@pytest.mark.parametrize(("raw", "key", "says"), WRONG)
def test_wrong_keys(raw: dict[str, Any], key: str, says: str) -> None:
    (problem,) = check_raw(raw)
    assert problem.key == key or not key
    assert says in str(problem)


@pytest.mark.parametrize("raw", RIGHT)
def test_right_keys(raw: dict[str, Any]) -> None:
    assert check_raw(raw) == []


def test_all_wrong_keys_come_at_once() -> None:
    problems = check_raw({"stage": 1, "fp16": {"enabled": True, "histeresis": 2}, "amp": {"enabled": "auto"}})
    keys = ["deepspeed.stage", "deepspeed.fp16.enabled", "deepspeed.fp16.histeresis", "deepspeed.amp"]
    assert [problem.key for problem in problems] == keys


def test_every_owned_and_refused_key_is_one_that_deepspeed_reads() -> None:
    started_otherwise = {"datastates_ckpt", "autotuning", "data_efficiency"}  # sections that are read as a whole
    for key in {*OWNED, *REFUSED} - started_otherwise:
        assert known_key(key), key


def test_fields_are_those_of_deepspeeds_own_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    for section, (file, name) in _SECTION_MODELS.items():
        module = importlib.import_module("deepspeed." + file.removesuffix(".py").replace("/", "."))
        real = {field.alias or key for key, field in getattr(module, name).model_fields.items()}
        assert set(section_fields(section) or ()) == real, section


def test_removed_keys_are_those_that_deepspeed_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = pytest.importorskip("deepspeed.runtime.config")
    top, zero = config._REMOVED_TOP_LEVEL_CONFIG_KEYS, config._REMOVED_ZERO_CONFIG_KEYS
    assert set(removed_keys()) == set(top) | {f"zero_optimization.{key}" for key in zero}
    assert not set(top) & top_level_keys()
