"""What a model's distribution is away from a teacher's, a chunk of logits at a time, with its gradient.

Both forms of the teacher end in the same arithmetic: a distribution over events, where an event is one token of the
vocabulary or, where only the teacher's likeliest are known, all the others together.
Shapes: N tokens, C tokens of a chunk, V vocabulary (this rank's rows), K likeliest tokens, E events, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ds_train.models.loss import IGNORE_INDEX, ChunkLoss, CrossEntropy, VocabularyShard, log_softmax, own_rows

Divergence = Literal["forward-kl", "reverse-kl", "js"]

_LEAST = -80.0
"""Log-probability that the rest of the vocabulary has at least, where there is no rest: far below what matters."""


@dataclass(frozen=True)
class TeacherHead:
    """A teacher by its last hidden states (N, D) and whole head (V, D): logits are made a chunk at a time."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def logits(self, chunk: slice, shard: VocabularyShard | None, rows: int) -> Tensor:
        """The teacher's logits (C, V) for this rank's `rows` rows of the vocabulary."""
        own = slice(None) if shard is None else slice(shard.start, shard.start + rows)
        bias = None if self.bias_V is None else self.bias_V[own]
        return functional.linear(self.hidden_ND[chunk], self.weight_VD[own], bias)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher by its logits (N, V), for models that do more than a product in their head."""

    logits_NV: Tensor

    def logits(self, chunk: slice, shard: VocabularyShard | None, rows: int) -> Tensor:
        """As `TeacherHead.logits`."""
        own = slice(None) if shard is None else slice(shard.start, shard.start + rows)
        return self.logits_NV[chunk, own]


@dataclass(frozen=True)
class TopLogits:
    """A teacher by its `K` likeliest tokens (N, K), and the log-probabilities at the temperature, (N, K + 1), of them
    and, last, of all others together."""

    tokens_NK: Tensor
    logp_NE: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, count: int, temperature: float) -> TopLogits:
        """The `count` likeliest of logits (N, V)."""
        logp_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
        logp_NK, tokens_NK = logp_NV.topk(min(count, logp_NV.shape[-1]))
        others_NV = logp_NV.scatter(1, tokens_NK, -torch.inf)
        rest_N1 = others_NV.logsumexp(-1, keepdim=True).clamp(min=_LEAST)
        return cls(tokens_NK, torch.cat([logp_NK, rest_N1], -1))


Targets = TeacherHead | TeacherLogits | TopLogits


class Distillation:
    """A `ChunkLoss`: (1 - alpha) x cross-entropy + alpha x temperature^2 x divergence, at every labelled position."""

    def __init__(
        self, kind: Divergence, temperature: float, alpha: float, labels_N: Tensor, targets: Targets,
        shard: VocabularyShard | None = None,
    ) -> None:  # fmt: skip
        self._kind, self._temperature, self._alpha = kind, temperature, alpha
        self._labels_N, self._targets, self._shard = labels_N, targets, shard
        self._hard: ChunkLoss = CrossEntropy(labels_N, shard)

    def __call__(self, logits_CV: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        counts_C1 = (self._labels_N[chunk] != IGNORE_INDEX)[:, None]
        student_CV = log_softmax(logits_CV.float() / self._temperature, self._shard)
        soft = self._top if isinstance(self._targets, TopLogits) else self._whole
        loss_C1, grad_CV = soft(student_CV, chunk, logits_CV)
        weight = self._alpha * self._temperature**2
        # Not a product with 0: what isn't counted may be infinite.
        loss = weight * torch.where(counts_C1, loss_C1, 0.0).sum()
        grad_CV = torch.where(counts_C1, grad_CV, 0.0).mul_(self._alpha * self._temperature)
        if self._alpha < 1:
            hard, hard_CV = self._hard(logits_CV, chunk, with_gradient)
            loss = loss + (1 - self._alpha) * hard
            if hard_CV is not None:
                grad_CV.add_(hard_CV, alpha=1 - self._alpha)
        return loss, grad_CV

    def _whole(self, student_CV: Tensor, chunk: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence (C, 1), its gradient (C, V) of the divided logits) from all of the teacher's."""
        assert not isinstance(self._targets, TopLogits)
        theirs_CV = self._targets.logits(chunk, self._shard, logits_CV.shape[-1])
        teacher_CV = log_softmax(theirs_CV.float() / self._temperature, self._shard)
        terms_CV, slopes_CV = divergence(self._kind, teacher_CV, student_CV)
        sums_C2 = torch.stack([terms_CV.sum(-1), slopes_CV.sum(-1)], -1)
        if self._shard is not None:
            self._shard.sum(sums_C2)
        return sums_C2[:, :1], slopes_CV.addcmul_(student_CV.exp_(), sums_C2[:, 1:], value=-1)

    def _top(self, student_CV: Tensor, chunk: slice, _: Tensor) -> tuple[Tensor, Tensor]:
        """As `_whole`, from the likeliest tokens and the rest."""
        assert isinstance(self._targets, TopLogits)
        rows_CK = own_rows(self._targets.tokens_NK[chunk], student_CV, self._shard)
        own_CK = rows_CK >= 0
        place_CK = rows_CK.clamp(min=0)
        ours_CK = student_CV.gather(1, place_CK).masked_fill(~own_CK, 0.0)
        # The others have a logarithm by their own largest, and a gradient by their shares of it: 1 minus the known
        # ones, or a quotient by that, would be rounding where the model is sure.
        outside_CV = student_CV.scatter_add(1, place_CK, torch.where(own_CK, -torch.inf, 0.0))
        most_C1 = outside_CV.amax(-1, keepdim=True)
        if self._shard is not None:
            most_C1 = self._shard.largest(most_C1)
        outside_CV.sub_(most_C1.clamp_(min=torch.finfo(most_C1.dtype).min)).exp_()
        ours_CE = torch.cat([ours_CK, outside_CV.sum(-1, keepdim=True)], -1)
        if self._shard is not None:
            self._shard.sum(ours_CE)
        sum_C1 = ours_CE[:, -1:].clone()
        ours_CE[:, -1:] = torch.where(sum_C1 > 0, sum_C1.log() + most_C1, _LEAST)
        terms_CE, slopes_CE = divergence(self._kind, self._targets.logp_NE[chunk], ours_CE)
        grad_CV = student_CV.exp_().mul_(-slopes_CE.sum(-1, keepdim=True))
        grad_CV.addcmul_(outside_CV, slopes_CE[:, -1:] / sum_C1.clamp_(min=1.0))
        return terms_CE.sum(-1, keepdim=True), grad_CV.scatter_add_(1, place_CK, slopes_CE[:, :-1] * own_CK)


def divergence(kind: Divergence, teacher_CE: Tensor, student_CE: Tensor) -> tuple[Tensor, Tensor]:
    """(terms, slopes), both (C, E), from log-probabilities of events.

    The terms add up to the divergence; a slope is the student's probability times the divergence's derivative by it,
    so that the gradient of a logit is its event's slope minus its probability times the sum of the slopes.
    """
    if kind == "forward-kl":
        p_CE = teacher_CE.exp()
        return torch.where(p_CE > 0, p_CE * (teacher_CE - student_CE), 0.0), -p_CE
    q_CE = student_CE.exp()
    if kind == "reverse-kl":
        terms_CE = torch.where(q_CE > 0, q_CE * (student_CE - teacher_CE), 0.0)
        return terms_CE, terms_CE.clone()
    middle_CE = torch.logaddexp(teacher_CE, student_CE) - math.log(2)
    p_CE = teacher_CE.exp()
    ours_CE = torch.where(q_CE > 0, 0.5 * q_CE * (student_CE - middle_CE), 0.0)
    return ours_CE + torch.where(p_CE > 0, 0.5 * p_CE * (teacher_CE - middle_CE), 0.0), ours_CE
