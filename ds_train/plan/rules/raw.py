"""Raw `deepspeed:` keys beside what else the recipe says; deepspeed_keys.py checks them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import NO_QUANTIZER, KeyRule, Rule, nvme

# Keys of zero_optimization that only one of DeepSpeed's two ZeRO optimizers reads (zero/stage3.py, stage_1_and_2.py).
_STAGE_3 = frozenset({
    "sub_group_size", "leaf_module", "memory_efficient_linear", "override_module_apply", "enable_sanity_checks",
    "log_trace_cache_warnings",
})  # fmt: skip
_STAGES_1_AND_2 = frozenset({
    "round_robin_gradients", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "parameter_alignment",
})  # fmt: skip
_DISK_KEYS = frozenset({"buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init"})


def _raw_zero(facts: Facts, wanted: Callable[[str], bool]) -> dict[str, Any]:
    section = facts.raw("zero_optimization")
    keys = section if isinstance(section, dict) else {}
    return {f"deepspeed.zero_optimization.{key}": value for key, value in keys.items() if wanted(key)}


def _stage(facts: Facts) -> int:
    """The ZeRO stage that raw keys speak of: their own, which is refused with the recipe's key, else what runs."""
    own = facts.raw("zero_optimization.stage")
    return own if isinstance(own, int) else facts.stage


def _ignored_by_stage(facts: Facts) -> dict[str, Any]:
    stage = _stage(facts)
    if stage == 0:
        return _raw_zero(facts, lambda key: key != "stage")
    if stage == 3:
        return _raw_zero(facts, lambda key: key in _STAGES_1_AND_2)
    return _raw_zero(facts, lambda key: key.startswith("stage3_") or key in _STAGE_3)


def _section(facts: Facts, key: str) -> dict[str, Any]:
    value = facts.raw(key)
    return value if isinstance(value, dict) else {}


def _ignored_offload(facts: Facts) -> dict[str, Any]:
    """Sections of what isn't offloaded; one that names a device is refused with the recipe's key."""
    parallel = facts.run.parallel
    device = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_params}

    def ignored(key: str) -> bool:
        own = _section(facts, f"zero_optimization.{key}").get("device", "none") if key in device else ""
        return device.get(key) == "none" and own == "none"

    return _raw_zero(facts, ignored)


def _for_disks(facts: Facts) -> dict[str, Any]:
    """Keys that only nvme offload reads, beside another kind of offload."""
    parallel = facts.run.parallel
    found: dict[str, Any] = {}
    for section, device in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_params),
    ):
        place = f"zero_optimization.{section}"
        if _section(facts, place).get("device", device) == "cpu":
            keys = _section(facts, place).items()
            found |= {f"deepspeed.{place}.{key}": value for key, value in keys if key in _DISK_KEYS}
    return found


def _ignored_sections(facts: Facts) -> dict[str, Any]:
    """Raw sections about something that the recipe doesn't use."""
    dtype = facts.run.precision.dtype
    unused = {"aio": not nvme(facts), "fp16": dtype != "fp16", "bf16": dtype != "bf16"}
    # One that is switched on is refused with the recipe's key.
    return {
        f"deepspeed.{key}": facts.raw(key)
        for key, off in unused.items()
        if off and facts.raw(key) is not None and _section(facts, key).get("enabled") is not True
    }


def _bad_communication(facts: Facts) -> bool:
    value = facts.raw("communication_data_type")
    return value not in (None, "auto") and (not isinstance(value, str) or value.lower() not in ("fp32", "fp16", "bf16"))


RULES: tuple[Rule | KeyRule, ...] = (
    KeyRule(
        "raw-stage", _ignored_by_stage, lambda f, _: f"DeepSpeed ignores it at stage {_stage(f)}",
        lambda f, _: "leave it out" if _stage(f) == 3 else "leave it out, or raise parallel.zero_stage",
    ),
    KeyRule(
        "raw-offload", _ignored_offload, "nothing is offloaded there",
        "leave it out, or set parallel.offload_optimizer or parallel.offload_params",
    ),
    KeyRule("raw-disk", _for_disks, "only nvme offload reads it", "leave it out"),
    KeyRule(
        "raw-section", _ignored_sections, "the recipe doesn't use it, and DeepSpeed ignores it", "leave it out"
    ),
    Rule(
        "raw-communication", "deepspeed.communication_data_type",
        _bad_communication,
        "DeepSpeed reduces gradients in fp32, fp16 or bf16", "write one of the three",
    ),
    Rule(
        "raw-communication-fp16", "deepspeed.communication_data_type",
        lambda f: str(f.raw("communication_data_type")).lower() == "fp16" and f.run.precision.dtype != "fp16",
        "without fp16's loss scale, gradients below 6e-8 become zeros on their way", "write bf16 or fp32",
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
