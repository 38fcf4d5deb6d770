"""What a model is trained on, by task: the summed loss of a micro-batch, and the scores of evaluation.

Losses are sums, not means: the step loop divides by the number of labels in the whole global batch, so the loss
and its gradient are the same however the batch is cut into micro-batches and ranks.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.models.loss import (
    IGNORE_INDEX,
    ChunkLoss,
    CrossEntropy,
    VocabularyShard,
    cross_entropy_sum,
    linear_loss,
    logits_loss,
    score_tokens,
)
from ds_train.plan.outline import gives_plain_logits

Batch = Mapping[str, Tensor]

SAMPLE_IDS = "sample_ids"
"""Key of a micro-batch: one number per sample, the same in every layout; (B,) int64."""

TOKEN_IDS = "token_ids"
"""Key of a micro-batch in a pipeline whose last stage looks at the tokens: a second name of `input_ids`."""


_Extra = Callable[[], Tensor | None]


class Objective(Protocol):
    """Something else than cross-entropy to train on."""

    def chunk_loss(self, batch: Batch, shard: VocabularyShard | None) -> ChunkLoss:
        """The loss of the micro-batch's logits, whose tokens are flattened. Called before the model's forward pass."""

    def extra_loss(self) -> Tensor | None:
        """What is added to that, a differentiable scalar. Called once, when the layers have run."""


class TaskLoss:
    """Calls a model (or the engine around it) on micro-batches.

    For language models whose own forward ends in `logits = self.<head>(hidden)`, the head's forward is swapped for
    one that returns the loss, so that the logits of the whole micro-batch never exist. Everything before the head,
    and ZeRO's hooks on the head, run as they are. Other models give logits, and the loss is taken from them.
    """

    def __init__(self, model: PreTrainedModel, vocabulary_group: Any = None) -> None:
        """`vocabulary_group`: the ranks that the head's rows are cut over; None where each has the whole head."""
        head = model.get_output_embeddings() if vocabulary_group is not None else plain_head(model)
        self._model = model
        self._head = _HeadLoss(head, vocabulary_group) if head is not None else None
        self.objective: Objective | None = None
        """What is trained on; None is cross-entropy. Evaluation always is cross-entropy."""

    @property
    def fused(self) -> bool:
        """Whether the loss is computed inside the head."""
        return self._head is not None

    def train_loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Summed loss of the micro-batch: scalar, fp32, differentiable."""
        labels_N = _rows(batch["labels"])
        shard = self._head.shard if self._head is not None else None
        objective = self.objective
        if objective is None:
            loss_of, extra = None, None
        else:
            loss_of, extra = objective.chunk_loss(batch, shard), objective.extra_loss
        if self._head is not None:
            with self._head.on(labels_N, loss_of or CrossEntropy(labels_N, shard), extra):
                return forward(**model_inputs(batch)).logits
        if loss_of is None or extra is None:
            logits = forward(**model_inputs(batch)).logits
            return cross_entropy_sum(logits.view(-1, logits.shape[-1]), labels_N)
        with _loss_as_logits(self._model, loss_of, extra):
            return forward(**model_inputs(batch)).logits

    @torch.no_grad()
    def scores(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """(summed cross-entropy, correct predictions, labels) of the micro-batch: (3,) fp64, without a gradient."""
        labels = batch["labels"]
        count = (labels != IGNORE_INDEX).sum()
        if self._head is None:
            logits = forward(**model_inputs(batch)).logits
            loss = cross_entropy_sum(logits.view(-1, logits.shape[-1]), labels.view(-1))
            correct = (logits.argmax(-1) == labels).sum()
        else:
            with self._head.on(_rows(labels)):
                loss, correct = forward(**model_inputs(batch)).logits
        return torch.stack([loss.double(), correct.double(), count.double()])


def weighted(loss: Tensor, weight: float) -> Tensor:
    """`loss` times `weight`, with a gradient that isn't finite where the loss isn't, so that its step is skipped."""
    return loss * (loss.detach() * 0.0 + weight)  # 0 times what isn't finite is NaN


class _HeadLoss:
    """The forward of a head module: logits as ever, or the loss while labels are set."""

    def __init__(self, head: Any, group: Any) -> None:
        self._module = head
        self.shard = None if group is None else VocabularyShard.of(group, head.weight.shape[0])
        self._logits = head.forward
        self._labels: Tensor | None = None
        self._loss_of: ChunkLoss | None = None
        self._extra: _Extra | None = None
        head.forward = self._forward  # type: ignore[method-assign, assignment]

    def on(self, labels_N: Tensor, loss_of: ChunkLoss | None = None, extra: _Extra | None = None) -> _HeadLoss:
        """The forward passes of the block give the loss, or without `loss_of` what `score_tokens` gives."""
        self._labels, self._loss_of, self._extra = labels_N, loss_of, extra
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._labels = None

    def _forward(self, hidden: Tensor) -> Any:
        if self._labels is None:
            return self._logits(hidden)
        weight, bias = self._module.weight, self._module.bias
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        if len(hidden_ND) != len(self._labels):
            raise ValueError(f"{len(hidden_ND)} hidden states but {len(self._labels)} labels")
        if self._loss_of is None:
            return score_tokens(hidden_ND, weight, bias, self._labels, self.shard)
        loss = linear_loss(hidden_ND, weight, bias, self._loss_of, self.shard)
        extra = self._extra() if self._extra is not None else None
        return loss if extra is None else loss + extra


@contextlib.contextmanager
def _loss_as_logits(model: nn.Module, loss_of: ChunkLoss, extra: _Extra) -> Iterator[None]:
    """Forward passes of the block give the loss in place of the logits.

    Inside of the engine's forward pass, as by the head: the hooks that DeepSpeed puts on what that returns must be the
    first of the backward pass (bf16_optimizer.py:500).
    """

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        loss, more = logits_loss(output.logits.view(-1, output.logits.shape[-1]), loss_of), extra()
        output.logits = loss if more is None else loss + more
        return output

    handle = model.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if the model's forward does nothing with the logits but return them.

    Families that scale or cap their logits (gemma2, cohere, granite ...) must not have their head swapped: that
    would be a silently wrong loss. So the forward's own source is read: `logits` has one assignment, the head's call.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    names = [name for name, module in model.named_children() if module is head]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(model).forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    if len(names) == 1 and gives_plain_logits(tree, names[0]):
        return head
    return None


def _rows(labels: Tensor) -> Tensor:
    """Labels (B, T) or (B,) as (N,), those of patches (B, P, K) as (N, K)."""
    return labels.flatten(0, 1) if labels.dim() == 3 else labels.reshape(-1)


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The micro-batch on `device`, which isn't waited for.

    A GPU takes more than a few KB of other memory only when it has done what it was given before. torch keeps pinned
    memory until it has been read.
    """
    pinned = {
        key: value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        for key, value in batch.items()
    }
    return {key: value.to(device, non_blocking=True) for key, value in pinned.items()}


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model's forward takes of a micro-batch."""
    return {key: value for key, value in batch.items() if key not in ("labels", SAMPLE_IDS, TOKEN_IDS)}
