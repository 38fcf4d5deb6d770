"""The batch triple: global batch = micro-batch x accumulation x data ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ds_train.config.batch import BatchSection
from ds_train.errors import Problem, UserError

LARGEST_AUTO_MICRO = 8
MICRO_BATCHES_PER_STAGE = 4
"""A pipeline of p stages idles (p - 1) / (m + p - 1) of a step of m micro-batches: with 4 p of them below a fifth."""


@dataclass(frozen=True)
class BatchPlan:
    """Samples per step, per forward pass of a rank in training and in evaluation, and forward passes per step."""

    global_samples: int
    micro_samples: int
    eval_micro_samples: int
    accumulation: int


def plan_batch(batch: BatchSection, data_ranks: int, stages: int = 1) -> BatchPlan:
    """Resolve `auto` and check divisibility for `data_ranks` data-parallel ranks of `stages` pipeline stages each.

    Raises:
        UserError: the global batch can't be cut evenly; names the nearest that can.
    """
    problems = uneven(batch, data_ranks)
    if problems:
        raise UserError(problems)
    share = batch.global_samples // data_ranks
    if batch.micro_samples == "auto":
        largest = min(LARGEST_AUTO_MICRO, share)
        if stages > 1:
            largest = max(1, min(largest, share // (MICRO_BATCHES_PER_STAGE * stages)))
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    else:
        micro = batch.micro_samples
    evaluation = micro if batch.eval_micro_samples == "auto" else batch.eval_micro_samples
    return BatchPlan(batch.global_samples, micro, evaluation, share // micro)


def uneven(batch: BatchSection, data_ranks: int) -> list[Problem]:
    """Why the global batch can't be cut evenly over `data_ranks`, with the nearest that can; nothing where it can."""
    wanted = batch.global_samples
    unit, what = data_ranks, f"data ranks = {data_ranks}"
    if batch.micro_samples != "auto":
        unit *= batch.micro_samples
        what = f"micro_samples x data ranks = {batch.micro_samples} x {data_ranks} = {unit}"
    if wanted % unit == 0:
        return []
    below = wanted // unit * unit
    fix = "nearest: " + ", ".join(str(size) for size in (below, below + unit) if size)
    return [Problem("batch.global_samples", f"not a multiple of {what}", fix, wanted)]
