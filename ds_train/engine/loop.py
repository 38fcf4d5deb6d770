"""The only step loop: one `StepResult` per optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_train.config import RunConfig
from ds_train.data.batches import count_labels
from ds_train.engine.build import Assembly
from ds_train.engine.ranks import RankInfo, all_sum
from ds_train.models.load import fold_seed
from ds_train.optim.build import set_learning_rate
from ds_train.plan.make import RunPlan
from ds_train.schedule.learning_rate import learning_rate_factor


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    `step` counts from 1; `tokens` are the positions consumed up to here (samples x sequence length), the clock of
    every schedule; `real_tokens` leaves padding out. `loss` is the mean over the labels of the global batch, in nats.
    `grad_norm` is the L2 norm of the whole gradient before clipping. `applied` is False where DeepSpeed skipped the
    update (fp16 overflow, non-finite gradients).
    """

    step: int
    tokens: int
    real_tokens: int
    labels: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    seconds: float


@dataclass(frozen=True)
class EvalResult:
    """Held-out scores after `step` steps: loss in nats per label, accuracy of the most likely label."""

    step: int
    loss: float
    accuracy: float
    labels: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def train_steps(
    run: RunConfig, plan: RunPlan, info: RankInfo, parts: Assembly, first: int, steps: int
) -> Iterator[StepResult]:
    """Train steps `first` (counted from 0) to `steps` - 1, yielding after each. Collective."""
    tokens_per_step = run.batch.global_samples * run.data.sequence_length
    for step, batches in parts.data.train.steps(first, steps, run.data.workers):
        started = time.perf_counter()
        tokens = (step + 1) * tokens_per_step
        lr = run.optimizer.lr * learning_rate_factor(run.schedule, tokens, steps * tokens_per_step)
        set_learning_rate(parts.engine.optimizer, lr)
        # Dropout draws from a seed of its own at every step and rank, so there is no generator state to save.
        torch.manual_seed(fold_seed(run.seed, "step", step, info.rank))
        counts = all_sum(_counts(batches).to(parts.engine.device))
        labels, real_tokens = (int(count) for count in counts)
        loss_sum = torch.zeros((), dtype=torch.float64, device=parts.engine.device)
        norm = 0.0
        # DeepSpeed divides by accumulation and data ranks; the loss is a mean over the global batch's labels.
        weight = plan.batch.accumulation * plan.layout.data / max(1, labels)
        for index, batch in enumerate(batches):
            loss = parts.task.train_loss(parts.engine, _to(batch, parts.engine.device))
            parts.engine.backward(loss * weight)
            loss_sum += loss.detach()
            if plan.zero_stage == 0 and index + 1 == len(batches):
                norm = _gradient_norm(parts.engine.module)
            parts.engine.step()
        if plan.zero_stage > 0:
            norm = float(parts.engine.get_global_grad_norm() or 0.0)
        yield StepResult(
            step=step + 1,
            tokens=tokens,
            real_tokens=real_tokens,
            labels=labels,
            loss=float(all_sum(loss_sum)) / max(1, labels),
            lr=lr,
            grad_norm=norm,
            applied=parts.engine.was_step_applied(),
            seconds=time.perf_counter() - started,
        )


def evaluate(run: RunConfig, parts: Assembly, step: int) -> EvalResult | None:
    """Score the first `track.eval_samples` held-out samples; None where nothing is held out. Collective."""
    if parts.data.validation is None:
        return None
    started = time.perf_counter()
    parts.engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=parts.engine.device)
    for batch in parts.data.validation.eval(run.track.eval_samples):
        totals += parts.task.scores(parts.engine, _to(batch, parts.engine.device))
    parts.engine.train()
    loss, correct, labels = all_sum(totals).tolist()
    return EvalResult(
        step, loss / max(1.0, labels), correct / max(1.0, labels), int(labels), time.perf_counter() - started
    )


def due(every: int | None, step: int) -> bool:
    """Whether something done every `every` steps is done after step `step`; None is never."""
    return every is not None and step % every == 0


def _counts(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(labels, tokens that are not padding) of this rank's micro-batches: (2,) int64."""
    return torch.tensor([count_labels(batches), sum(_real_tokens(batch) for batch in batches)])


def _real_tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].numel()


def _gradient_norm(module: torch.nn.Module) -> float:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _to(batch: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
