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
)
from ds_train.plan.translate import instead

WRONG = [
    ({"zero_optimizaton": {}}, "deepspeed.zero_optimizaton", "`deepspeed.zero_optimization`"),
    ({"zero_optimization": {"sub_group_sise": 1}}, "deepspeed.zero_optimization.sub_group_sise", "sub_group_size"),
    ({"zero_optimization": {"prefetch_bucket_size": 1}}, "", "`deepspeed.zero_optimization.stage3_prefetch_"),
    ({"zero_optimization": {"offload_optimizer": {"buffer_cout": 1}}}, "", "offload_optimizer.buffer_count`"),
    ({"stage": 3}, "deepspeed.stage", "`deepspeed.zero_optimization.stage`"),
    ({"aio": {"blok_size": 1}}, "deepspeed.aio.blok_size", "`deepspeed.aio.block_size`"),
    ({"flops_profiler": {"enable": True}}, "deepspeed.flops_profiler.enable", "flops_profiler.enabled"),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, "deepspeed.checkpoint", "`checkpoint` of the recipe"),
    ({"dataloader_drop_last": True}, "deepspeed.dataloader_drop_last", "leave it out"),
    ({"vocabulary_size": 50304}, "deepspeed.vocabulary_size", "nothing in DeepSpeed"),
    ({"dump_state": "yes"}, "deepspeed.dump_state", "takes true or false"),
    ({"flops_profiler": {"profile_step": "first"}}, "deepspeed.flops_profiler.profile_step", "whole number"),
    ({"timers": {"throughputs": {}}}, "deepspeed.timers.throughputs", "timers.throughput"),
    ({"nothing_like_it": 1}, "deepspeed.nothing_like_it", "leave it out"),
    ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage", "set parallel.zero_stage=2 instead"),
    ({"zero_optimization": {"cpu_offload": True}}, "", "set parallel.offload_optimizer=cpu instead"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "", "set parallel.offload_params=cpu instead"),
    ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled", "set precision.dtype=bf16 instead"),
    ({"bfloat16": {"enabled": True}}, "deepspeed.bfloat16", "set precision.dtype=bf16 instead"),
    ({"optimizer": {"type": "OneBitAdam", "params": {}}}, "deepspeed.optimizer", "set optimizer.kind instead"),
    ({"train_batch_size": "auto"}, "deepspeed.train_batch_size", "leave it out; batch.global_samples decides it"),
    ({"zero_optimization": True}, "deepspeed.zero_optimization", "write keys under it"),
    ({"aio": None}, "deepspeed.aio", "write keys under it"),
    ({"data_types": {"keep_in_fp32_modules": "auto", "buffer_dtyp": 1}}, "", "data_types.buffer_dtype"),
    ({"steps_per_print": "auto"}, "deepspeed.steps_per_print", "leave it out"),
    ({"zero_optimization": {"leaf_module": {"names": "auto"}}}, "", "leave it out"),
    ({"zero_optimization": {"sub_group_size": "many"}}, "deepspeed.zero_optimization.sub_group_size", "whole number"),
    ({"zero_optimization": {"sub_group_size": 1.5}}, "deepspeed.zero_optimization.sub_group_size", "whole number"),
    ({"zero_optimization": {"round_robin_gradients": 1}}, "", "takes true or false"),
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
    {"aio": {"single_submit": False, "intra_op_parallelism": 1}, "disable_python_gc": True, "dump_state": False},
]


@pytest.mark.parametrize(("raw", "key", "says"), WRONG)
def test_wrong_keys(raw: dict[str, Any], key: str, says: str) -> None:
    (problem,) = check_raw(raw)
    assert problem.key == key or not key
    assert says in str(problem)


TRANSLATED = [
    ("zero_optimization.stage", 3, "set parallel.zero_stage=3 instead"),
    ("gradient_accumulation_steps", "auto", "leave it out; batch.global_samples and batch.micro_samples decide it"),
    ("compile", {"deepcompile": True}, "set model.compile=true instead"),
    ("zero_optimization.stage", "auto", "leave it out; parallel.zero_stage decides it"),
    ("zero_optimization.reduce_bucket_size", 5e8, "set parallel.bucket_elements=500000000 instead"),
    ("zero_optimization.overlap_comm", True, "set parallel.overlap_communication=true instead"),
    ("zero_optimization.cpu_offload", False, "leave it out"),
    ("zero_optimization.cpu_offload_param", True, "set parallel.offload_params=cpu instead"),
    ("gradient_accumulation_steps", 8, "set batch.global_samples to 8 x micro-batch x data ranks instead"),
    ("fp16.enabled", True, "set precision.dtype=fp16 instead"),
    ("fp16.enabled", False, "leave it out; precision.dtype decides it"),
    ("bfloat16", {"enabled": True}, "set precision.dtype=bf16 instead"),
    ("fp16.loss_scale", 0, "set precision.loss_scale=dynamic instead"),
    ("fp16.loss_scale", 128, "set precision.loss_scale=128 instead"),
    ("data_types.grad_accum_dtype", "bf16", "set precision.gradient_dtype=bf16 instead"),
    ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}, "set precision.dtype=bf16 instead"),
    ("torch_autocast", True, "set precision.dtype instead"),
    ("tensor_parallel", {"autotp_size": 4}, "set parallel.tensor=4 instead"),
    ("tensor_parallel", {"autotp_size": "auto"}, "leave it out; parallel.tensor decides it"),
    ("activation_checkpointing", {"partition_activations": True}, "set model.activation_checkpointing=true instead"),
    ("zero_allow_untested_optimizer", True, "leave it out; optimizer.kind decides it"),
    (
        "optimizer", {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": "auto"}},
        "set optimizer.kind=adamw optimizer.lr=3e-05 optimizer.betas=[0.8,0.999] instead",
    ),
    ("optimizer", {"type": "Adam", "params": {"adam_w_mode": False}}, "set optimizer.kind=adam instead"),
    ("optimizer", {"type": "Lamb"}, "set optimizer.kind instead; it is one of adamw, adam, adagrad, sgd"),
    (
        "scheduler",
        {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 50, "total_num_steps": 1000, "warmup_max_lr": 1e-3}},
        "set schedule.kind=linear schedule.warmup_fraction=0.05 optimizer.lr=0.001 instead",
    ),
    ("scheduler", {"type": "LRRangeTest"}, "leave it out; `ds-train lr-find` sweeps learning rates"),
    ("wandb", {"enabled": True, "project": "x"}, "set track.wandb=online track.wandb_project=x instead"),
    ("wandb", {"enabled": False}, "leave it out"),
    ("pipeline", {"stages": 2}, "set parallel.pipeline instead"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fix"), TRANSLATED)
def test_owned_keys_are_translated_with_their_values(key: str, value: Any, fix: str) -> None:
    assert instead(key, value) == fix


@pytest.mark.parametrize("raw", RIGHT)
def test_right_keys(raw: dict[str, Any]) -> None:
    assert check_raw(raw) == []


def test_all_wrong_keys_come_at_once() -> None:
    problems = check_raw({"stage": 1, "fp16": {"enabled": True, "histeresis": 2}, "amp": {"enabled": "auto"}})
    keys = ["deepspeed.stage", "deepspeed.fp16.enabled", "deepspeed.fp16.histeresis", "deepspeed.amp"]
    assert [problem.key for problem in problems] == keys


def test_each_owned_refused_and_removed_key_is_told_with_a_way_out() -> None:
    for path in {*OWNED, *REFUSED, *removed_keys()}:
        raw: Any = 1
        for part in reversed(path.split(".")):
            raw = {part: raw}
        (problem,) = check_raw(raw)
        assert path.startswith(problem.key.removeprefix("deepspeed."))
        assert problem.reason
        assert problem.fix


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
    assert not set(top) & set(section_fields("") or ())
