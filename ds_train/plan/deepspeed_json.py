"""The only writer of DeepSpeed keys: recipe and layout -> the JSON that `deepspeed.initialize` takes.

Everything that DeepSpeed would otherwise guess, or guess wrongly without a word, is written out; the source of each
such key is named beside it (paths under the installed deepspeed/, version 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_train.config import RunConfig
from ds_train.plan.batch import BatchPlan
from ds_train.plan.topology import Cluster, Layout

# Elements. A bucket is a buffer on every rank: a share of the model, but never so small that latency rules.
_SMALLEST_BUCKET, _LARGEST_BUCKET, _DEFAULT_BUCKET = 1_000_000, 200_000_000, 50_000_000

OWNED = {
    "train_batch_size": "batch.global_samples",
    "train_micro_batch_size_per_gpu": "batch.micro_samples",
    "gradient_accumulation_steps": "batch.global_samples and batch.micro_samples",
    "managed_gradient_accumulation": "batch.global_samples and batch.micro_samples",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16.enabled": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "fp16.loss_scale": "precision.loss_scale",
    "fp16.initial_scale_power": "precision.initial_loss_scale_power",
    "data_types.grad_accum_dtype": "precision.gradient_dtype",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_params",
    "zero_optimization.overlap_comm": "parallel.overlap_communication",
    "zero_optimization.reduce_bucket_size": "parallel.bucket_elements",
    "zero_optimization.allgather_bucket_size": "parallel.bucket_elements",
    "zero_optimization.zero_quantized_weights": "parallel.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "parallel.quantized_gradients",
    "zero_optimization.zero_hpz_partition_size": "parallel.secondary_partition",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "checkpoint.tag_validation": "checkpoint",
    "gradient_allreduce_op": "nothing: the loss of the global batch is a mean",
    "prescale_gradients": "nothing: the loss of the global batch is a mean",
    "torch_autocast": "precision.dtype",
    "bf16.bf16_master_weights_and_grads": "precision",
    "bf16.bf16_optimizer_states": "precision",
    "fp16.fp16_master_weights_and_grads": "precision",
    "activation_checkpointing": "model.activation_checkpointing",
    "compile": "model.compile",
    "tensor_parallel": "parallel.tensor",
    "expert_parallel": "parallel",
    "pipeline": "parallel.pipeline",
    "data_efficiency": "data",
    "wandb": "track.wandb",
    "tensorboard": "track",
    "csv_monitor": "track",
    "comet": "track",
}
"""DeepSpeed keys that the plan writes, or that would work against it, and the recipe key that is set instead."""


def deepspeed_json(
    run: RunConfig, layout: Layout, batch: BatchPlan, cluster: Cluster, zero_stage: int, parameters: int | None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Args:
        zero_stage: the stage that is really used; see `make_plan`.
        parameters: size of the model, for the buckets; None where it isn't known yet.
    """
    precision = run.precision
    planned: dict[str, Any] = {
        # DeepSpeed checks the triple against all ranks, not the data ranks (runtime/config.py:602).
        "train_batch_size": batch.micro_samples * batch.accumulation * layout.ranks,
        "train_micro_batch_size_per_gpu": batch.micro_samples,
        "gradient_accumulation_steps": batch.accumulation,
        # Left out it means 1.0 (runtime/constants.py:203).
        "gradient_clipping": run.optimizer.clip_norm,
        # Left out, gradients accumulate in the dtype of the model: about 1 % error at 64 micro-batches in bf16.
        "data_types": {"grad_accum_dtype": precision.gradient_dtype if precision.dtype != "fp32" else "fp32"},
        "bf16": {"enabled": precision.dtype == "bf16"},
        "fp16": _fp16(run),
        "zero_optimization": _zero(run, cluster, zero_stage, parameters),
        # The optimizer is torch's own, also with offload: nothing is compiled at start-up.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # The default only warns when ranks disagree on a tag, and the checkpoint is split (E:4900).
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": False,
    }
    return _merged(planned, run.deepspeed)


def _fp16(run: RunConfig) -> dict[str, Any]:
    if run.precision.dtype != "fp16":
        return {"enabled": False}
    dynamic = run.precision.loss_scale == "dynamic"
    return {
        "enabled": True,
        "loss_scale": 0 if dynamic else run.precision.loss_scale,
        "initial_scale_power": run.precision.initial_loss_scale_power,
    }


def _zero(run: RunConfig, cluster: Cluster, stage: int, parameters: int | None) -> dict[str, Any]:
    parallel = run.parallel
    bucket = bucket_elements(parameters) if parallel.bucket_elements == "auto" else parallel.bucket_elements
    overlap = parallel.overlap_communication
    zero: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return zero
    zero |= {
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Without streams there is nothing to overlap with, and a second bucket costs memory.
        "overlap_comm": cluster.device != "cpu" and cluster.ranks > 1 if overlap == "auto" else overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket // 10 * 9,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 2 * bucket,
            # Small parameters stay whole on every rank: a gather would cost more than it saves.
            "stage3_param_persistence_threshold": min(100_000, bucket // 100),
            "zero_quantized_weights": parallel.quantized_weights,
            "zero_quantized_gradients": parallel.quantized_gradients,
            "zero_hpz_partition_size": parallel.secondary_partition,
        }
    for key, device in (("offload_optimizer", parallel.offload_optimizer), ("offload_param", parallel.offload_params)):
        if device != "none":
            zero[key] = {"device": device, "pin_memory": parallel.pin_memory and cluster.device != "cpu"}
            if device == "nvme":
                zero[key]["nvme_path"] = parallel.nvme_path
    return zero


def bucket_elements(parameters: int | None) -> int:
    """Elements of a communication bucket for a model of that size: an eighth of it, within bounds."""
    if parameters is None:
        return _DEFAULT_BUCKET
    # Even, as stage 1 and 2 ask for (stage_1_and_2.py:389).
    return max(_SMALLEST_BUCKET, min(_LARGEST_BUCKET, parameters // 8)) // 2 * 2


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
