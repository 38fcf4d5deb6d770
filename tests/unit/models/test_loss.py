"""The fused loss against torch's cross-entropy over whole logits, and where it may be used."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ds_train.models import loss as fused
from ds_train.models.tasks import TaskLoss


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 3, 2), (37, 16, 101), (130, 8, 259)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_cross_entropy_over_whole_logits(
    tokens: int, hidden: int, vocabulary: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "chunk_tokens", lambda *_: 10)  # several chunks, the last one ragged
    h = torch.randn(tokens, hidden, dtype=torch.float64).float().requires_grad_()
    w = torch.randn(vocabulary, hidden).requires_grad_()
    b = torch.randn(vocabulary).requires_grad_() if bias else None
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.3] = -100
    ours = fused.linear_loss(h, w, b, fused.CrossEntropy(labels))
    (0.37 * ours).backward()
    inputs = [x.detach().double().requires_grad_() for x in (h, w, b) if x is not None]
    theirs = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*inputs), labels, reduction="sum", ignore_index=-100
    )
    (0.37 * theirs).backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for mine, oracle in zip([x for x in (h, w, b) if x is not None], inputs, strict=True):
        torch.testing.assert_close(mine.grad.double(), oracle.grad, rtol=1e-4, atol=1e-5)


def test_scores_are_the_loss_and_the_hits() -> None:
    h, w, labels = torch.randn(29, 6), torch.randn(11, 6), torch.randint(0, 11, (29,))
    labels[::4] = -100
    loss, correct = fused.score_tokens(h, w, None, labels)
    logits = h @ w.t()
    kept = labels != -100
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
    assert correct.item() == (logits.argmax(-1) == labels)[kept].sum().item()


def test_all_labels_ignored_is_zero_with_zero_gradient() -> None:
    h = torch.randn(5, 4, requires_grad=True)
    loss = fused.linear_loss(h, torch.randn(7, 4), None, fused.CrossEntropy(torch.full((5,), -100)))
    loss.backward()
    assert loss.item() == 0.0
    assert not h.grad.any()


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "use_cache": False,
}
FAMILIES = {
    "llama": True, "qwen2": True, "qwen3": True, "mistral": True, "gpt_neox": True, "phi": True, "olmo2": True,
    "starcoder2": True, "gpt2": True, "opt": False, "gemma2": False, "cohere": False, "granite": False,
}  # fmt: skip


def tiny(family: str) -> PreTrainedModel:
    keys = dict(SMALL) | ({"head_dim": 8} if family == "gemma2" else {}) | ({"n_inner": 48} if family == "gpt2" else {})
    if family in ("olmo2", "phi", "cohere", "opt"):
        keys["pad_token_id"] = 1
    if family == "opt":
        keys |= {"word_embed_proj_dim": 32, "ffn_dim": 48}
        keys.pop("intermediate_size")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_loss_of_its_own_logits(family: str) -> None:
    """Families that scale or cap their logits are recognised and keep their own forward pass."""
    model = tiny(family).eval()
    with torch.no_grad():  # large logits, so that a cap or a scale would show
        model.get_output_embeddings().weight.mul_(40)
    ids, labels = torch.randint(0, 97, (2, 13)), torch.randint(0, 97, (2, 13))
    labels[0, :5] = -100
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 97), labels.view(-1), reduction="sum")
    task = TaskLoss(model)
    assert task.fused is FAMILIES[family]
    loss = task.train_loss(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-4)
    scored, correct, count = task.scores(model, {"input_ids": ids, "labels": labels}).tolist()
    assert scored == pytest.approx(expected.item(), rel=1e-5)
    assert correct == ((logits.argmax(-1) == labels) & (labels != -100)).sum().item()
    assert count == 21
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" in name or "embed_out" in name)
    assert model(input_ids=ids).logits.shape == (2, 13, 97), "the model must give logits again after the loss"


def test_a_16_bit_gradient_is_multiplied_by_the_whole_number() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(97, 32).bfloat16()
    labels = torch.randint(97, (64,))
    (fused.linear_loss(hidden, weight, None, fused.CrossEntropy(labels)) * (2 / 907)).backward()
    assert hidden.grad is not None
    wide = hidden.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(wide @ weight.double().T, labels, reduction="sum") * (2 / 907)).backward()
    assert wide.grad is not None
    assert float(hidden.grad.double().norm() / wide.grad.norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("labels", [(64,), (64, 3)])
def test_no_device_is_waited_for(labels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values can't be looked at: what runs on them never asks a device for one."""
    monkeypatch.setattr(fused, "chunk_tokens", lambda *_: 10)
    with torch.device("meta"):
        hidden, weight = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(97, 32, dtype=torch.bfloat16)
        targets = torch.zeros(labels, dtype=torch.int64)
    hidden.requires_grad_(), weight.requires_grad_()
    (fused.linear_loss(hidden, weight, None, fused.CrossEntropy(targets)) * 2.0).backward()
    assert hidden.grad is not None
    fused.score_tokens(hidden.detach(), weight.detach(), None, targets[:, 0] if targets.dim() == 2 else targets)


def test_devices_add_up_the_gradient_of_a_large_head_a_few_times_a_micro_batch() -> None:
    for vocabulary in (32_000, 50_257, 128_256, 262_144):
        assert 8192 / fused.chunk_tokens(vocabulary, "cuda") <= 16
        assert fused.chunk_tokens(vocabulary, "cuda") * vocabulary * 8 <= 1.1 * 2**30, "bytes of logits and gradients"
        assert fused.chunk_tokens(vocabulary, "cuda", compared=True) * vocabulary * 28 <= 1.8 * 2**30, "and a teacher's"
