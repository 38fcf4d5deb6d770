"""Raw `deepspeed:` keys beside what else the recipe says; deepspeed_keys.py checks them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import NO_QUANTIZER, KeyRule, Rule, nvme


def _raw_zero(facts: Facts, wanted: Callable[[str], bool]) -> dict[str, Any]:
    section = facts.raw("zero_optimization")
    keys = section if isinstance(section, dict) else {}
    return {f"deepspeed.zero_optimization.{key}": value for key, value in keys.items() if wanted(key)}


def _ignored_by_stage(facts: Facts) -> dict[str, Any]:
    if facts.stage == 0:
        return _raw_zero(facts, lambda key: key != "stage")
    return _raw_zero(facts, lambda key: key.startswith("stage3_")) if facts.stage < 3 else {}


def _ignored_offload(facts: Facts) -> dict[str, Any]:
    parallel = facts.run.parallel
    device = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_params}
    return _raw_zero(facts, lambda key: device.get(key) == "none")


def _ignored_sections(facts: Facts) -> dict[str, Any]:
    """Raw sections about something that the recipe doesn't use."""
    dtype = facts.run.precision.dtype
    unused = {"aio": not nvme(facts), "fp16": dtype != "fp16", "bf16": dtype != "bf16"}
    return {f"deepspeed.{key}": facts.raw(key) for key, off in unused.items() if off and facts.raw(key) is not None}


RULES: tuple[Rule | KeyRule, ...] = (
    KeyRule(
        "raw-stage", _ignored_by_stage, lambda f, _: f"DeepSpeed ignores it at stage {f.stage}",
        "leave it out, or raise parallel.zero_stage",
    ),
    KeyRule(
        "raw-offload", _ignored_offload, "nothing is offloaded there",
        "leave it out, or set parallel.offload_optimizer or parallel.offload_params",
    ),
    KeyRule(
        "raw-section", _ignored_sections, "the recipe doesn't use it, and DeepSpeed ignores it", "leave it out"
    ),
    Rule(
        "raw-communication", "deepspeed.communication_data_type",
        lambda f: f.raw("communication_data_type") not in (None, "fp32", "fp16", "bf16"),
        "DeepSpeed reduces gradients in fp32, fp16 or bf16", "write one of the three",
    ),
    Rule(
        "raw-gds", "deepspeed.aio.use_gds", lambda f: f.raw("aio.use_gds") is True and f.cluster.device != "cuda",
        "GPUDirect storage is for CUDA devices (aio_config.py:36)", "set false",
    ),
    Rule(
        "raw-quantized", "deepspeed.zero_optimization.zero_quantized_nontrainable_weights",
        lambda f: f.raw("zero_optimization.zero_quantized_nontrainable_weights") is True
        and (f.stage < 3 or NO_QUANTIZER(f)),
        "it needs stage 3 and DeepSpeed's quantizer of CUDA and NPU devices", "leave it out",
    ),
)  # fmt: skip
