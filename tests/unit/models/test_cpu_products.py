"""Widened products against float64, and against the model that they replace."""

from __future__ import annotations

import pytest
import torch
from unit.models.test_loss import tiny

from ds_train.models import loss as fused
from ds_train.models.cpu_products import fp32_products_are_faster, use_fp32_products


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("vectors", [False, True])
def test_only_cpus_that_have_no_unit_for_16_bits_widen(
    matrices: bool, vectors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
    assert not fp32_products_are_faster("cpu", torch.float32)
    assert not fp32_products_are_faster("cuda", torch.bfloat16)
    assert fp32_products_are_faster("cpu", torch.bfloat16) is not (matrices or vectors)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_rounds_once(bias: bool) -> None:
    layer = torch.nn.Linear(33, 17, bias=bias).bfloat16()
    use_fp32_products(torch.nn.Sequential(layer))  # type: ignore[arg-type]
    hidden = torch.randn(2, 5, 33).bfloat16().requires_grad_()
    upstream = torch.randn(2, 5, 17).bfloat16()
    output = layer(hidden)
    output.backward(upstream)
    tensors = [hidden, *layer.parameters()]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = torch.nn.functional.linear(*wide)
    expected.backward(upstream.double())
    # fp32 sums rounded once to bf16: at most half a unit in the last place, 2^-9, of the exact value.
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)
    for mine, oracle in zip(tensors, wide, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), oracle.grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_model_is_as_close_to_fp32_as_before(family: str) -> None:
    torch.manual_seed(0)
    reference = tiny(family).eval()
    ids = torch.randint(0, 97, (2, 13))
    exact = reference(input_ids=ids).logits
    plain = reference.bfloat16()
    before = (plain(input_ids=ids).logits.float() - exact).abs().max()
    use_fp32_products(plain)
    output = plain(input_ids=ids).logits
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).abs().max() <= 1.5 * before
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_the_fused_loss_widens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "fp32_products_are_faster", lambda device, dtype: True)
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 50, (40,))
    fused.linear_loss(hidden, weight, None, fused.CrossEntropy(labels)).backward()
    wide = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="sum").backward()
    for mine, oracle in zip((hidden, weight), wide, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), oracle.grad, rtol=2e-2, atol=2e-2)
