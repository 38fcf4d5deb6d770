"""Cross-entropy from hidden states and head weights, without ever holding the logits of the whole micro-batch.

Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
The gradient is computed in the forward pass, chunk by chunk, as in Liger's fused linear cross-entropy
(arXiv 2410.10989): a chunk's logits are turned into their own gradient and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ds_kernels.entropy import entropy_in_place, entropy_takes
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ds_train.models.cpu_products import fp32_products_are_faster
from ds_train.plan.activations import chunk_tokens

IGNORE_INDEX = -100
"""Label of a position that is not predicted (torch's and transformers' convention)."""

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits (C, V) of a chunk, its place among the tokens, whether a gradient is wanted) -> (summed loss, its gradient of
the logits (C, V) in fp32). With a head that is cut along the vocabulary, logits are this rank's and the loss is all's.
"""


@dataclass(frozen=True)
class VocabularyShard:
    """Rows `start` onwards of a head that is cut along the vocabulary over the ranks of `group`."""

    group: Any
    start: int

    @classmethod
    def of(cls, group: Any, rows: int) -> VocabularyShard:
        """This rank's shard, where every rank of `group` has `rows` rows."""
        return cls(group, dist.get_rank(group) * rows)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Maximum over the group, of a copy."""
        largest = tensor.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    loss_of: ChunkLoss,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Sum of `loss_of` over all tokens (scalar, fp32), where logits are `hidden @ weight.T + bias`, a chunk at a time.

    With `shard`, weight and bias are this rank's rows; loss and gradient of `hidden` are those of all rows.
    """
    return _LinearLoss.apply(hidden_ND, weight_VD, bias_V, loss_of, shard)


def logits_loss(logits_NV: Tensor, loss_of: ChunkLoss) -> Tensor:
    """Sum of `loss_of` over all tokens (scalar, fp32), from logits that a model has given."""
    return _LogitsLoss.apply(logits_NV, loss_of)


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy (scalar, fp32) of logits of any dtype; labels (N,) or (N, K), IGNORE_INDEX is left out."""
    if labels_N.dim() == 2:
        return _nll_sum(log_softmax(logits_NV, None), labels_N, None)
    return functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def score_tokens(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy, correctly predicted labels), both scalars in fp32, without a gradient."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros_like(loss)
    for chunk in _chunks(len(labels_N), weight_VD.shape[0], hidden_ND.device):
        logits_CV, labels_C = functional.linear(hidden_ND[chunk], weight_VD, bias_V).float(), labels_N[chunk]
        loss += _nll_sum(log_softmax(logits_CV, shard), labels_C, shard)
        highest_C, guess_C = logits_CV.max(-1)
        if shard is not None:
            first = torch.where(
                highest_C == shard.largest(highest_C), guess_C + shard.start, torch.iinfo(torch.int64).max
            )
            guess_C = -shard.largest(-first)
        correct += (guess_C == labels_C).sum()
    return loss, correct


def log_softmax(logits_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Log-probabilities in fp32, over all rows of the head."""
    if shard is None:
        return torch.log_softmax(logits_CV, -1, dtype=torch.float32)
    shifted_CV = logits_CV.float() - shard.largest(logits_CV.amax(-1, keepdim=True).float())
    return shifted_CV.sub_(shard.sum(shifted_CV.exp().sum(-1, keepdim=True)).log_())


def _nll_sum(logp_CV: Tensor, labels_C: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Summed negative log-likelihood of the labels, over all rows of the head."""
    if labels_C.dim() == 2:
        own_CK = own_rows(labels_C, logp_CV, shard)
        picked = logp_CV.gather(1, own_CK.clamp(min=0)).masked_fill(own_CK == IGNORE_INDEX, 0.0)
        return -picked.sum() if shard is None else shard.sum(-picked.sum())
    if shard is None:
        return functional.nll_loss(logp_CV, labels_C, ignore_index=IGNORE_INDEX, reduction="sum")
    return shard.sum(functional.nll_loss(logp_CV, own_rows(labels_C, logp_CV, shard), reduction="sum"))


def own_rows(labels_C: Tensor, logits_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Labels, of any shape, as rows of this rank's part of the head; IGNORE_INDEX for those of other ranks."""
    if shard is None:
        return labels_C
    rows_C = labels_C - shard.start
    return rows_C.masked_fill((rows_C < 0) | (rows_C >= logits_CV.shape[-1]), IGNORE_INDEX)


def _chunks(
    tokens: int, vocabulary: int, device: torch.device, in_place: bool = False, compared: bool = False
) -> list[slice]:
    size = chunk_tokens(vocabulary, device.type, in_place, compared)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class CrossEntropy:
    """A `ChunkLoss`: summed cross-entropy against labels (N,), or (N, K) of which the same logits predict each."""

    def __init__(self, labels_N: Tensor, shard: VocabularyShard | None = None) -> None:
        self._labels_N, self._shard = labels_N, shard

    def takes(self, logits_CV: Tensor) -> bool:
        """Whether `in_place` can be given logits like these."""
        return self._shard is None and entropy_takes(logits_CV, self._labels_N)

    def in_place(self, logits_CV: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """As the call, with a gradient that takes the logits' place, in their dtype."""
        loss = entropy_in_place(logits_CV, self._labels_N[chunk], IGNORE_INDEX, with_gradient)
        return loss, logits_CV if with_gradient else None

    def __call__(self, logits_CV: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        labels_C, shard = self._labels_N[chunk], self._shard
        # log p in place of the logits, then p - onehot in place of log p: one fp32 buffer per chunk.
        logp_CV = log_softmax(logits_CV, shard)
        loss = _nll_sum(logp_CV, labels_C, shard)
        if not with_gradient:
            return loss, None
        labels_CK = labels_C.view(len(labels_C), -1)
        count_C1 = (labels_CK != IGNORE_INDEX).sum(-1, keepdim=True)
        grad_CV = logp_CV.exp_()
        # A device would have to be waited for to know that there is nothing to multiply.
        if grad_CV.device.type != "cpu" or not bool((count_C1 == 1).all()):
            grad_CV.mul_(count_C1)
        own_CK = own_rows(labels_CK, grad_CV, shard)
        grad_CV.scatter_add_(1, own_CK.clamp(min=0), -(own_CK >= 0).to(grad_CV.dtype))
        return loss, grad_CV


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        loss_of: ChunkLoss,
        shard: VocabularyShard | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs_any = needs_hidden or needs_weight or needs_bias
        dtype = hidden_ND.dtype
        if fp32_products_are_faster(hidden_ND.device, dtype):
            hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
            bias_V = None if bias_V is None else bias_V.float()
        # These logits are nobody else's.
        in_place, compared = False, not isinstance(loss_of, CrossEntropy)
        if isinstance(loss_of, CrossEntropy) and loss_of.takes(hidden_ND.new_empty(0, weight_VD.shape[0])):
            in_place, loss_of = True, loss_of.in_place
        chunks = _chunks(len(hidden_ND), weight_VD.shape[0], hidden_ND.device, in_place, compared)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = _SumOfChunks(weight_VD, len(chunks)) if needs_weight else None
        grad_bias = _SumOfChunks(bias_V, len(chunks)) if needs_bias and bias_V is not None else None
        for chunk in chunks:
            hidden_CD = hidden_ND[chunk]
            chunk_loss, grad_CV = loss_of(functional.linear(hidden_CD, weight_VD, bias_V), chunk, needs_any)
            loss += chunk_loss
            if grad_CV is None:
                continue
            if grad_bias is not None:
                grad_bias.add(grad_CV.sum(0, dtype=torch.float32))
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.add_product(grad_CV.t(), hidden_CD)
        if shard is not None and grad_hidden is not None:
            shard.sum(grad_hidden)
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(dtype),
            *(None if part is None else part.total(dtype) for part in (grad_weight, grad_bias)),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias = (
            # In place: another backward pass through this would be told that they are gone.
            None if gradient is None else _times(gradient, upstream[0])
            for gradient in ctx.saved_tensors
        )
        return hidden, weight, bias, None, None


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` times a number in fp32, in place: in 16 bits it would be off by up to 0.4 %, as a whole."""
    if gradient.dtype == factor.dtype or gradient.device.type == "cpu":
        return gradient.mul_(factor)
    # On devices the number would be rounded first.
    for part in gradient.split(chunk_tokens(gradient.shape[-1], gradient.device.type)):
        part.copy_(part.float() * factor)
    return gradient


class _SumOfChunks:
    """A gradient that chunks add to: in fp32, so that the sum isn't rounded to 16 bits at each of them."""

    def __init__(self, like: Tensor, chunks: int) -> None:
        self._sum = torch.zeros_like(like, dtype=torch.float32) if chunks > 1 else None

    def add(self, part: Tensor) -> None:
        """Add a chunk's gradient."""
        self._sum = part if self._sum is None else self._sum.add_(part)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the product of two matrices."""
        if self._sum is not None and self._sum.dtype == left.dtype:
            self._sum.addmm_(left, right)
        else:
            self.add(left @ right)

    def total(self, dtype: torch.dtype) -> Tensor | None:
        """The sum; nothing where no chunk had a gradient."""
        return None if self._sum is None else self._sum.to(dtype)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, loss_of: ChunkLoss) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        grad_NV = torch.empty_like(logits_NV)
        compared = not isinstance(loss_of, CrossEntropy)
        for chunk in _chunks(len(logits_NV), logits_NV.shape[1], logits_NV.device, compared=compared):
            chunk_loss, grad_CV = loss_of(logits_NV[chunk], chunk, True)
            loss += chunk_loss
            if grad_CV is not None:
                grad_NV[chunk] = grad_CV
        ctx.save_for_backward(grad_NV)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (grad_NV,) = ctx.saved_tensors
        return _times(grad_NV, upstream[0]), None
