"""ZeRO, offload, ZeRO++ and number formats."""

from __future__ import annotations

from pathlib import Path

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import (
    BELOW_3,
    NO_QUANTIZER,
    KeyRule,
    Rule,
    above,
    all_of,
    at,
    divisors,
    is_not,
    nvme,
    on_device,
)
from ds_train.plan.topology import processor_has_fp16


def _bad_nvme_path(facts: Facts) -> bool:
    path = facts.run.parallel.nvme_path
    return nvme(facts) and (path is None or (facts.cluster.here and not Path(path).is_dir()))


RULES: tuple[Rule | KeyRule, ...] = (
    # -- ZeRO, offload, ZeRO++ --------------------------------------------------------------------------------------
    Rule(
        "offload-stage", "parallel.offload_optimizer",
        all_of(is_not(at("parallel.offload_optimizer", "none")), at("parallel.zero_stage", 0)),
        "stage 0 keeps optimizer states on the device", "set parallel.zero_stage=1 or more",
    ),
    Rule(
        "offload-nvme-stage", "parallel.offload_optimizer", all_of(at("parallel.offload_optimizer", "nvme"), BELOW_3),
        "only stage 3 swaps optimizer states to a disk", "set parallel.zero_stage=3, or offload_optimizer=cpu",
    ),
    Rule(
        "offload-params-stage", "parallel.offload_params",
        all_of(is_not(at("parallel.offload_params", "none")), BELOW_3),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or offload_params=none",
    ),
    Rule(
        "nvme-path", "parallel.nvme_path", _bad_nvme_path,
        "nvme offload needs an existing folder on a local disk", "set parallel.nvme_path to one",
    ),
    Rule(
        "nvme-device", "parallel.offload_optimizer", all_of(nvme, on_device("hpu")),
        "DeepSpeed has no asynchronous file access on hpu (op_builder/hpu)", "offload to cpu",
    ),
    Rule(
        "nvme-optimizer", "optimizer.kind",
        all_of(at("parallel.offload_optimizer", "nvme"), is_not(at("optimizer.kind", "adam", "adamw"))),
        "the disk swapper is made for Adam's two moments", "set optimizer.kind=adamw, or offload_optimizer=cpu",
    ),
    Rule(
        "quantized-weights-stage", "parallel.quantized_weights",
        all_of(at("parallel.quantized_weights", True), BELOW_3),
        "below stage 3 there is no all-gather of weights to quantize", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-gradients-stage", "parallel.quantized_gradients",
        all_of(at("parallel.quantized_gradients", True), BELOW_3),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-weights-device", "parallel.quantized_weights",
        all_of(at("parallel.quantized_weights", True), NO_QUANTIZER),
        lambda f: f"DeepSpeed has no quantizer for {f.cluster.device}", "set false; it is for CUDA and NPU devices",
    ),
    Rule(
        "quantized-gradients-device", "parallel.quantized_gradients",
        all_of(at("parallel.quantized_gradients", True), NO_QUANTIZER),
        lambda f: f"DeepSpeed has no quantizer for {f.cluster.device}", "set false; it is for CUDA and NPU devices",
    ),
    Rule(
        "secondary-stage", "parallel.secondary_partition", all_of(above("parallel.secondary_partition", 1), BELOW_3),
        "a second copy of the weights belongs to stage 3", "set parallel.zero_stage=3, or secondary_partition=1",
    ),
    Rule(
        "secondary-divides", "parallel.secondary_partition",
        lambda f: f.cluster.ranks % f.run.parallel.secondary_partition,
        lambda f: f"it doesn't divide the {f.cluster.ranks} ranks", lambda f: divisors(f.cluster.ranks),
    ),
    Rule(
        "bucket", "parallel.bucket_elements",
        lambda f: isinstance(f.run.parallel.bucket_elements, int) and f.run.parallel.bucket_elements % 2,
        "ZeRO's buckets have an even number of elements (stage_1_and_2.py:389)",
        lambda f: f"auto, or {int(f.run.parallel.bucket_elements) + 1}",
    ),
    # -- precision --------------------------------------------------------------------------------------------------
    Rule(
        "fp16-cpu", "precision.dtype",
        lambda f: f.run.precision.dtype == "fp16" and f.cluster.device == "cpu" and f.cluster.here
        and not processor_has_fp16(),
        "this processor has no AVX512-FP16, and DeepSpeed refuses fp16 without it", "set precision.dtype=bf16",
    ),
    Rule(
        "gradient-dtype", "precision.gradient_dtype",
        lambda f: f.run.precision.gradient_dtype not in ("fp32", f.run.precision.dtype),
        lambda f: f"gradients of a {f.run.precision.dtype} model are accumulated in {f.run.precision.dtype} or fp32",
        "set precision.gradient_dtype=fp32",
    ),
)  # fmt: skip
