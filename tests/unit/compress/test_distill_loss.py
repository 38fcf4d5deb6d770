"""Distillation losses a chunk at a time against torch's own divergences over whole logits in float64."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ds_train.compress.distill_loss import Distillation, Divergence, Targets, TeacherHead, TeacherLogits, TopLogits
from ds_train.models import loss as fused

KINDS: tuple[Divergence, ...] = ("forward-kl", "reverse-kl", "js")
TOKENS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 37, 12, 7, 61


def oracle(kind: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of log-probabilities `q` from `p`, per row."""

    def kl(target: Tensor, other: Tensor) -> Tensor:
        return functional.kl_div(other, target, reduction="none", log_target=True).sum(-1)

    if kind == "forward-kl":
        return kl(p, q)
    if kind == "reverse-kl":
        return kl(q, p)
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


def with_rest(logp: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities of the `top` tokens and of all others together."""
    probabilities = logp.exp()
    known = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, top, True)
    rest = probabilities.masked_fill(known, 0.0).sum(-1, keepdim=True)
    return torch.cat([logp.gather(1, top), rest.log()], -1)


def inputs() -> tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight, bias = torch.randn(VOCABULARY, HIDDEN).requires_grad_(), torch.randn(VOCABULARY).requires_grad_()
    head = TeacherHead(
        torch.randn(TOKENS, TEACHER_HIDDEN), torch.randn(VOCABULARY, TEACHER_HIDDEN), torch.randn(VOCABULARY)
    )
    labels = torch.randint(0, VOCABULARY, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.3, -100)
    return hidden, weight, bias, head, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["head", "logits", "top"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (1.0, 0.7)])
def test_equals_the_divergence_over_whole_logits(
    kind: Divergence, form: str, alpha: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "chunk_tokens", lambda *_: 10)
    hidden, weight, bias, head, labels = inputs()
    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    ours, theirs = h @ w.t() + b, head.logits(slice(None), None, VOCABULARY).double()
    p, q = (torch.log_softmax(logits / temperature, -1) for logits in (theirs, ours))
    targets: Targets = head if form == "head" else TeacherLogits(theirs.float())
    if form == "top":
        top = theirs.topk(9).indices
        targets = TopLogits.of(theirs.float(), 9, temperature)
        p, q = with_rest(p, top), with_rest(q, top)
    kept = labels != -100
    expected = alpha * temperature**2 * oracle(kind, p, q)[kept].sum()
    expected = expected + (1 - alpha) * functional.cross_entropy(ours[kept], labels[kept], reduction="sum")
    (0.37 * expected).backward()
    loss = fused.linear_loss(hidden, weight, bias, Distillation(kind, temperature, alpha, labels, targets))
    (0.37 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for mine, reference in ((hidden, h), (weight, w), (bias, b)):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
    given = ours.detach().float().requires_grad_()
    from_logits = fused.logits_loss(given, Distillation(kind, temperature, alpha, labels, targets))
    torch.testing.assert_close(from_logits.double(), expected, rtol=1e-5, atol=0)
    from_logits.backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad @ w.float(), h.grad.float() / 0.37, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_as_the_likeliest_are_the_whole_distribution(kind: Divergence) -> None:
    hidden, weight, bias, head, labels = inputs()
    targets = TopLogits.of(head.logits(slice(None), None, VOCABULARY), VOCABULARY, 1.0)
    whole = fused.linear_loss(hidden, weight, bias, Distillation(kind, 1.0, 1.0, labels, head))
    top = fused.linear_loss(hidden, weight, bias, Distillation(kind, 1.0, 1.0, labels, targets))
    torch.testing.assert_close(top, whole, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (whole, top)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [5.0, 25.0, 60.0, 200.0])
def test_a_sure_model_learns_what_the_teacher_thinks_of_the_rest(kind: Divergence, ahead: float) -> None:
    """The model gives all but e^-ahead to the tokens that the teacher's likeliest are."""
    theirs, ours = torch.randn(TOKENS, VOCABULARY), torch.randn(TOKENS, VOCABULARY)
    top = theirs.topk(9).indices
    ours.scatter_add_(1, top, torch.full(top.shape, ahead))
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    given, exact = ours.clone().requires_grad_(), ours.double().requires_grad_()
    loss = fused.logits_loss(given, Distillation(kind, 1.0, 1.0, labels, TopLogits.of(theirs, 9, 1.0)))
    p, q = (with_rest(torch.log_softmax(logits, -1), top) for logits in (theirs.double(), exact))
    expected = oracle(kind, p, q).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (found,), (wanted,) = torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_its_teacher_has_nothing_to_learn() -> None:
    hidden, weight, bias, _, labels = inputs()
    head = TeacherHead(hidden.detach(), weight.detach(), bias.detach())
    for kind in KINDS:
        loss = fused.linear_loss(hidden, weight, bias, Distillation(kind, 1.5, 1.0, labels, head))
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert abs(loss.item()) < 1e-4
        assert gradient.abs().max() < 1e-4


def test_js_is_bounded_where_the_teacher_rules_a_token_out() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    targets = TeacherLogits(torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]]))
    loss = fused.logits_loss(logits, Distillation("js", 1.0, 1.0, torch.tensor([1]), targets))
    loss.backward()
    assert 0 < loss.item() < math.log(2)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


class Threads:
    """A `VocabularyShard` of one of two threads, which exchange tensors in turn."""

    def __init__(self, rank: int, start: int, box: list[Tensor | None], meeting: threading.Barrier) -> None:
        self.rank, self.start, self._box, self._meeting = rank, start, box, meeting

    def _both(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        self._box[self.rank] = tensor.clone()
        self._meeting.wait()
        first, second = self._box
        assert first is not None
        assert second is not None
        self._meeting.wait()
        return first, second

    def sum(self, tensor: Tensor) -> Tensor:
        first, second = self._both(tensor)
        return tensor.copy_(first + second)

    def largest(self, tensor: Tensor) -> Tensor:
        return torch.maximum(*self._both(tensor))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["head", "logits", "top"])
def test_ranks_that_share_the_vocabulary_find_the_same(kind: Divergence, form: str) -> None:
    hidden, weight, bias, head, labels = inputs()
    theirs = head.logits(slice(None), None, VOCABULARY)
    targets: Targets = {"head": head, "logits": TeacherLogits(theirs), "top": TopLogits.of(theirs, 9, 2.0)}[form]
    whole = fused.linear_loss(hidden, weight, bias, Distillation(kind, 2.0, 0.4, labels, targets))
    whole.backward()
    box: list[Tensor | None] = [None, None]
    meeting, cut = threading.Barrier(2, timeout=60), 29

    def part(rank: int) -> tuple[Tensor, list[Tensor]]:
        rows = slice(0, cut) if rank == 0 else slice(cut, VOCABULARY)
        shard: Any = Threads(rank, rows.start, box, meeting)
        own = [hidden.detach().clone(), weight.detach()[rows].clone(), bias.detach()[rows].clone()]
        h, w, b = (tensor.requires_grad_() for tensor in own)
        loss = fused.linear_loss(h, w, b, Distillation(kind, 2.0, 0.4, labels, targets, shard), shard)
        return loss.detach(), list(torch.autograd.grad(loss, own))

    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(part, rank) for rank in range(2)]]
    for loss, (of_hidden, *_) in results:
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(of_hidden, hidden.grad, rtol=1e-4, atol=1e-4)
    for place, tensor in ((1, weight), (2, bias)):
        joined = torch.cat([gradients[place] for _, gradients in results])
        torch.testing.assert_close(joined, tensor.grad, rtol=1e-4, atol=1e-4)
