"""What a model is trained on, by task: the summed loss of a micro-batch, and the scores of evaluation.

Losses are sums, not means: the step loop divides by the number of labels in the whole global batch, so the loss
and its gradient are the same however the batch is cut into micro-batches and ranks.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.models.loss import (
    IGNORE_INDEX,
    VocabularyShard,
    cross_entropy_sum,
    linear_cross_entropy,
    score_tokens,
)
from ds_train.plan.outline import gives_plain_logits

Batch = Mapping[str, Tensor]


class TaskLoss:
    """Calls a model (or the engine around it) on micro-batches.

    For language models whose own forward ends in `logits = self.<head>(hidden)`, the head's forward is swapped for
    one that returns the loss, so that the logits of the whole micro-batch never exist. Everything before the head,
    and ZeRO's hooks on the head, run as they are. Other models give logits, and the loss is taken from them.
    """

    def __init__(self, model: PreTrainedModel, vocabulary_group: Any = None) -> None:
        """`vocabulary_group`: the ranks that the head's rows are cut over; None where each has the whole head."""
        head = model.get_output_embeddings() if vocabulary_group is not None else plain_head(model)
        self._head = _HeadLoss(head, vocabulary_group) if head is not None else None

    @property
    def fused(self) -> bool:
        """Whether the loss is computed inside the head."""
        return self._head is not None

    def train_loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Summed cross-entropy of the micro-batch: scalar, fp32, differentiable."""
        labels = batch["labels"]
        if self._head is None:
            logits = forward(**_inputs(batch)).logits
            return cross_entropy_sum(logits.view(-1, logits.shape[-1]), _rows(labels))
        with self._head.on(labels, scoring=False):
            return forward(**_inputs(batch)).logits

    @torch.no_grad()
    def scores(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """(summed cross-entropy, correct predictions, labels) of the micro-batch: (3,) fp64, without a gradient."""
        labels = batch["labels"]
        count = (labels != IGNORE_INDEX).sum()
        if self._head is None:
            logits = forward(**_inputs(batch)).logits
            loss = cross_entropy_sum(logits.view(-1, logits.shape[-1]), labels.view(-1))
            correct = (logits.argmax(-1) == labels).sum()
        else:
            with self._head.on(labels, scoring=True):
                loss, correct = forward(**_inputs(batch)).logits
        return torch.stack([loss.double(), correct.double(), count.double()])


def carry_nonfinite(loss: Tensor) -> Tensor:
    """`loss` as it is, with a gradient that isn't finite where the loss isn't, so that its step is skipped."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


class _HeadLoss:
    """The forward of a head module: logits as ever, or the loss while labels are set."""

    def __init__(self, head: Any, group: Any) -> None:
        self._module = head
        self._shard = None if group is None else VocabularyShard.of(group, head.weight.shape[0])
        self._logits = head.forward
        self._labels: Tensor | None = None
        self._scoring = False
        head.forward = self._forward  # type: ignore[method-assign, assignment]

    def on(self, labels: Tensor, scoring: bool) -> _HeadLoss:
        self._labels, self._scoring = _rows(labels), scoring
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._labels = None

    def _forward(self, hidden: Tensor) -> Any:
        if self._labels is None:
            return self._logits(hidden)
        function = score_tokens if self._scoring else linear_cross_entropy
        weight, bias = self._module.weight, self._module.bias
        return function(hidden.reshape(-1, hidden.shape[-1]), weight, bias, self._labels, self._shard)


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


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
