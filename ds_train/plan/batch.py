"""The batch triple: global batch = micro-batch x accumulation x data ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ds_train.config.batch import BatchSection
from ds_train.errors import Problem, UserError

LARGEST_AUTO_MICRO = 8


@dataclass(frozen=True)
class BatchPlan:
    """Samples per step, per forward pass of a rank in training and in evaluation, and forward passes per step."""

    global_samples: int
    micro_samples: int
    eval_micro_samples: int
    accumulation: int


def plan_batch(batch: BatchSection, data_ranks: int) -> BatchPlan:
    """Resolve `auto` and check divisibility for `data_ranks` data-parallel ranks.

    Raises:
        UserError: the global batch can't be cut evenly; names the nearest that can.
    """
    wanted, known_micro = batch.global_samples, batch.micro_samples != "auto"
    unit = (int(batch.micro_samples) if known_micro else 1) * data_ranks
    if wanted % unit:
        lower, upper = wanted // unit * unit, (wanted // unit + 1) * unit
        what = f"micro_samples x data ranks = {batch.micro_samples} x {data_ranks}" if known_micro else "data ranks"
        nearest = ", ".join(str(value) for value in (lower, upper) if value)
        raise UserError(
            Problem("batch.global_samples", f"not a multiple of {what} = {unit}", f"nearest: {nearest}", wanted)
        )
    share = wanted // data_ranks
    if batch.micro_samples == "auto":
        micro = next(size for size in range(min(LARGEST_AUTO_MICRO, share), 0, -1) if share % size == 0)
    else:
        micro = batch.micro_samples
    evaluation = micro if batch.eval_micro_samples == "auto" else batch.eval_micro_samples
    return BatchPlan(wanted, micro, evaluation, share // micro)
