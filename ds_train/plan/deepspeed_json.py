"""The only writer of DeepSpeed keys: recipe and layout -> the JSON that `deepspeed.initialize` takes.

Everything that DeepSpeed would otherwise guess, or guess wrongly without a word, is written out; the source of each
such key is named beside it (paths under the installed deepspeed/, version 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_train.config import RunConfig
from ds_train.plan.batch import BatchPlan
from ds_train.plan.model_size import ModelSize
from ds_train.plan.stage import effective_stage
from ds_train.plan.topology import Cluster, Layout

# Elements. A bucket is a buffer on every rank: a share of the model, but never so small that latency rules.
_SMALLEST_BUCKET, _LARGEST_BUCKET, _DEFAULT_BUCKET = 1_000_000, 200_000_000, 50_000_000

OWNED = {
    "train_batch_size": "batch.global_samples",
    "train_micro_batch_size_per_gpu": "batch.micro_samples",
    "gradient_accumulation_steps": "batch.global_samples and batch.micro_samples",
    "managed_gradient_accumulation": "batch.global_samples and batch.micro_samples",
    "optimizer": "optimizer.kind",
    "zero_force_ds_cpu_optimizer": "optimizer.kind",
    "zero_allow_untested_optimizer": "optimizer.kind",
    "scheduler": "schedule.kind",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16.enabled": "precision.dtype",
    "bfloat16": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "fp16.auto_cast": "precision.dtype",
    "torch_autocast": "precision.dtype",
    "data_types.param_dtype": "precision.dtype",
    "fp16.loss_scale": "precision.loss_scale",
    "fp16.initial_scale_power": "precision.initial_loss_scale_power",
    "data_types.grad_accum_dtype": "precision.gradient_dtype",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload_params",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.pin_memory",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory": "parallel.pin_memory",
    "zero_optimization.offload_param.device": "parallel.offload_params",
    "zero_optimization.offload_param.nvme_path": "parallel.nvme_path",
    "zero_optimization.offload_param.pin_memory": "parallel.pin_memory",
    "zero_optimization.overlap_comm": "parallel.overlap_communication",
    "zero_optimization.reduce_bucket_size": "parallel.bucket_elements",
    "zero_optimization.allgather_bucket_size": "parallel.bucket_elements",
    "allgather_size": "parallel.bucket_elements",
    "zero_optimization.zero_quantized_weights": "parallel.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "parallel.quantized_gradients",
    "zero_optimization.zero_hpz_partition_size": "parallel.secondary_partition",
    "activation_checkpointing": "model.activation_checkpointing",
    "compile": "model.compile",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "pipeline": "parallel.pipeline",
    "pipeline.pipe_partitioned": "parallel.pipeline",
    "pipeline.grad_partitioned": "parallel.pipeline",
    "wandb": "track.wandb",
}
"""DeepSpeed keys that the plan writes, or that would work against it, and the recipe key that is set instead."""

TUNABLE = frozenset({
    "wall_clock_breakdown", "timers.throughput.enabled", "timers.throughput.synchronized",
    "zero_optimization.contiguous_gradients", "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance", "zero_optimization.stage3_param_persistence_threshold",
})  # fmt: skip
"""Keys that the plan writes and a recipe's `deepspeed:` section may write otherwise."""


def deepspeed_json(
    run: RunConfig, layout: Layout, batch: BatchPlan, cluster: Cluster, size: ModelSize | None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, raw `deepspeed:` keys merged on top.

    Args:
        size: the model's sizes, for the buckets; None where they aren't known yet.
    """
    precision = run.precision
    planned: dict[str, Any] = {
        # Sequence ranks, which share samples, are data ranks to DeepSpeed (parallel/mesh.py).
        "train_batch_size": batch.micro_samples * batch.accumulation * layout.data * layout.sequence,
        "train_micro_batch_size_per_gpu": batch.micro_samples,
        "gradient_accumulation_steps": batch.accumulation,
        # Left out it means 1.0 (runtime/constants.py:203).
        "gradient_clipping": run.optimizer.clip_norm,
        "data_types": {"grad_accum_dtype": _accumulation_dtype(run, layout, batch)},
        "bf16": {"enabled": precision.dtype == "bf16"},
        "fp16": _fp16(run),
        "zero_optimization": _zero(run, cluster, size),
        # The optimizer is torch's own, also with offload (engine.py:2342): nothing is compiled at start-up.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # The default only warns when ranks disagree on a tag, and the checkpoint is split (engine.py:4900).
        "checkpoint": {"tag_validation": "Fail"},
        # Its timer would synchronize the device at every step (utils/timer.py:237); ours measures.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "wall_clock_breakdown": False,
    }
    if layout.pipe > 1:
        # Sent whole: cut over tensor ranks, messages are as large and come with a gather (pipe/engine.py:732).
        planned["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return _merged(planned, run.deepspeed)


def bucket_elements(parameters: int | None) -> int:
    """Elements of a communication bucket for a model of that size: an eighth of it, within bounds."""
    if parameters is None:
        return _DEFAULT_BUCKET
    # Even, as stages 1 and 2 ask for (stage_1_and_2.py:389).
    return max(_SMALLEST_BUCKET, min(_LARGEST_BUCKET, parameters // 8)) // 2 * 2


def _accumulation_dtype(run: RunConfig, layout: Layout, batch: BatchPlan) -> str:
    """Format of accumulated gradients. Left out it is the model's: about 1 % error at 64 micro-batches in bf16."""
    sharded = effective_stage(run)[0] >= 2 and run.parallel.offload_optimizer == "none" and layout.pipe == 1
    if batch.accumulation == 1 and sharded:
        # Nothing is accumulated: a second, wider buffer of the same numbers would only cost memory.
        return run.precision.dtype
    return run.precision.gradient_dtype


def _fp16(run: RunConfig) -> dict[str, Any]:
    if run.precision.dtype != "fp16":
        return {"enabled": False}
    return {
        "enabled": True,
        # 0 stands for a dynamic scale (precision_config.py:113).
        "loss_scale": 0 if run.precision.loss_scale == "dynamic" else run.precision.loss_scale,
        "initial_scale_power": run.precision.initial_loss_scale_power,
    }


def _zero(run: RunConfig, cluster: Cluster, size: ModelSize | None) -> dict[str, Any]:
    parallel = run.parallel
    stage, _ = effective_stage(run)
    if stage == 0:
        return {"stage": 0}
    chosen = bucket_elements(size.parameters if size else None)
    bucket = chosen if parallel.bucket_elements == "auto" else parallel.bucket_elements
    overlap = parallel.overlap_communication
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Without streams there is nothing to overlap with, and a second bucket costs memory. Pipelines can't.
        "overlap_comm": cluster.device != "cpu" and cluster.ranks > 1 and parallel.pipeline == 1
        if overlap == "auto"
        else overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    return zero | (_stage3(run, bucket) if stage == 3 else {}) | _offload(run, cluster)


def _stage3(run: RunConfig, bucket: int) -> dict[str, Any]:
    return {
        "stage3_prefetch_bucket_size": bucket * 9 // 10,
        "stage3_max_live_parameters": 2 * bucket,
        "stage3_max_reuse_distance": 2 * bucket,
        # Small parameters stay whole on every rank: a gather would cost more than it saves.
        "stage3_param_persistence_threshold": min(100_000, bucket // 100),
        # The export gathers one parameter at a time, whatever this says; it serves `save_16bit_model` only.
        "stage3_gather_16bit_weights_on_model_save": False,
        "zero_quantized_weights": run.parallel.quantized_weights,
        "zero_quantized_gradients": run.parallel.quantized_gradients,
        "zero_hpz_partition_size": run.parallel.secondary_partition,
    }


def _offload(run: RunConfig, cluster: Cluster) -> dict[str, Any]:
    parallel = run.parallel
    sections: dict[str, Any] = {}
    for key, device in (("offload_optimizer", parallel.offload_optimizer), ("offload_param", parallel.offload_params)):
        if device != "none":
            sections[key] = {"device": device, "pin_memory": parallel.pin_memory and cluster.device != "cpu"}
        if device == "nvme":
            sections[key]["nvme_path"] = parallel.nvme_path
    return sections


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
