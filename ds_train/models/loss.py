"""Cross-entropy from hidden states and head weights, without ever holding the logits of the whole micro-batch.

Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
The gradient is computed in the forward pass, chunk by chunk, as in Liger's fused linear cross-entropy
(arXiv 2410.10989): a chunk's logits are turned into their own gradient and thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ds_train.models.cpu_products import fp32_products_are_faster

IGNORE_INDEX = -100
"""Label of a position that is not predicted (torch's and transformers' convention)."""

CHUNK_LOGITS = 2 * 2**20
"""Logits held at once: 8 MB in fp32."""


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


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Summed cross-entropy (scalar, fp32) of `hidden @ weight.T + bias` against labels; IGNORE_INDEX is left out.

    Labels (N, K) are K of each position, predicted by the same logits. With `shard`, weight and bias are this rank's
    rows; loss and gradient of `hidden` are those of all rows.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, shard)


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy (scalar, fp32) of logits of any dtype; labels (N,) or (N, K), IGNORE_INDEX is left out."""
    if labels_N.dim() == 2:
        return _nll_sum(_log_softmax(logits_NV, None), labels_N, None)
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
    for chunk in _chunks(hidden_ND, weight_VD, labels_N):
        logits_CV, labels_C = functional.linear(hidden_ND[chunk], weight_VD, bias_V).float(), labels_N[chunk]
        loss += _nll_sum(_log_softmax(logits_CV, shard), labels_C, shard)
        highest_C, guess_C = logits_CV.max(-1)
        if shard is not None:
            first = torch.where(
                highest_C == shard.largest(highest_C), guess_C + shard.start, torch.iinfo(torch.int64).max
            )
            guess_C = -shard.largest(-first)
        correct += (guess_C == labels_C).sum()
    return loss, correct


def _log_softmax(logits_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Log-probabilities in fp32, over all rows of the head."""
    if shard is None:
        return torch.log_softmax(logits_CV, -1, dtype=torch.float32)
    shifted_CV = logits_CV.float() - shard.largest(logits_CV.amax(-1, keepdim=True).float())
    return shifted_CV.sub_(shard.sum(shifted_CV.exp().sum(-1, keepdim=True)).log_())


def _nll_sum(logp_CV: Tensor, labels_C: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Summed negative log-likelihood of the labels, over all rows of the head."""
    if labels_C.dim() == 2:
        own_CK = _own_labels(labels_C, logp_CV, shard)
        picked = logp_CV.gather(1, own_CK.clamp(min=0)).masked_fill(own_CK == IGNORE_INDEX, 0.0)
        return -picked.sum() if shard is None else shard.sum(-picked.sum())
    if shard is None:
        return functional.nll_loss(logp_CV, labels_C, ignore_index=IGNORE_INDEX, reduction="sum")
    return shard.sum(functional.nll_loss(logp_CV, _own_labels(labels_C, logp_CV, shard), reduction="sum"))


def _own_labels(labels_C: Tensor, logits_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Labels as rows of this rank's part of the head; IGNORE_INDEX for those of other ranks."""
    if shard is None:
        return labels_C
    rows_C = labels_C - shard.start
    return rows_C.masked_fill((rows_C < 0) | (rows_C >= logits_CV.shape[-1]), IGNORE_INDEX)


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> list[slice]:
    tokens = labels_N.shape[0]
    if hidden_ND.shape[0] != tokens:
        raise ValueError(f"{hidden_ND.shape[0]} hidden states but {tokens} labels")
    size = max(1, CHUNK_LOGITS // weight_VD.shape[0])
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        shard: VocabularyShard | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dtype = hidden_ND.dtype
        if fp32_products_are_faster(hidden_ND.device, dtype):
            hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
            bias_V = None if bias_V is None else bias_V.float()
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # fp32, so that the sum over chunks is not rounded to 16 bits at each of them.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        for chunk in _chunks(hidden_ND, weight_VD, labels_N):
            hidden_CD, labels_C = hidden_ND[chunk], labels_N[chunk]
            # log p in place of the logits, then p - onehot in place of log p: one fp32 buffer per chunk.
            logp_CV = _log_softmax(functional.linear(hidden_CD, weight_VD, bias_V), shard)
            loss += _nll_sum(logp_CV, labels_C, shard)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            labels_CK = labels_C.view(len(labels_C), -1)
            count_C1 = (labels_CK != IGNORE_INDEX).sum(-1, keepdim=True)
            grad_CV = logp_CV.exp_()
            if not bool((count_C1 == 1).all()):
                grad_CV.mul_(count_C1)
            own_CK = _own_labels(labels_CK, grad_CV, shard)
            grad_CV.scatter_add_(1, own_CK.clamp(min=0), -(own_CK >= 0).to(grad_CV.dtype))
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                if grad_weight.dtype == grad_CV.dtype:
                    grad_weight.addmm_(grad_CV.t(), hidden_CD)
                else:
                    grad_weight += grad_CV.t() @ hidden_CD
        if shard is not None and grad_hidden is not None:
            shard.sum(grad_hidden)
        ctx.save_for_backward(
            *(None if gradient is None else gradient.to(dtype) for gradient in (grad_hidden, grad_weight, grad_bias))
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias = (
            None if grad is None else grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, weight, bias, None, None
