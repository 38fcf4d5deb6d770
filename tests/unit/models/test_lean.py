"""Lean layers against the modules that they replace: the same output, the same gradients, fewer bytes kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

from ds_train.models.lean import use_lean_layers


def run(module: Any, hidden: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    module.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    output.backward(upstream)
    return [output.detach(), hidden.grad, *(parameter.grad for parameter in module.parameters())]


def kept_bytes(module: Any, hidden: Tensor) -> int:
    """Bytes that the backward pass needs besides parameters and the input."""
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = module(hidden.clone().requires_grad_())
    known = {output.data_ptr(), *(parameter.data_ptr() for parameter in module.parameters())}
    return sum(size for place, size in kept.items() if place not in known)


def config(width: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, **more)


def layer(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "norm":
        module: nn.Module = LlamaRMSNorm(48, eps=1e-5)
        nn.init.normal_(module.weight)
        return module
    bias = kind == "gated with bias"
    act = "gelu_pytorch_tanh" if kind == "gated gelu" else "silu"
    return LlamaMLP(config(48, mlp_bias=bias, hidden_act=act))


class Norm(nn.Module):
    """The formula, in the dtype of its input."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight.clone()), epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def oracle(module: Any) -> nn.Module:
    """The module in float64."""
    module = copy.deepcopy(module)
    return (Norm(module.weight.detach(), 1e-5) if isinstance(module, LlamaRMSNorm) else module).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["norm", "gated", "gated with bias", "gated gelu"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48), (1, 1, 48)])
def test_a_lean_layer_is_as_close_to_float64_as_its_original(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain = layer(kind).to(dtype)
    lean = copy.deepcopy(plain)
    assert use_lean_layers(lean) == 1
    hidden, upstream = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    mine, other = run(lean, hidden, upstream), run(plain, hidden, upstream)
    exact = run(oracle(plain), hidden.double(), upstream.double())
    assert torch.equal(mine[0], other[0])
    for found, original, wide in zip(mine, other, exact, strict=True):
        assert found.dtype == dtype
        last_place = torch.finfo(dtype).eps * float(wide.abs().max())
        assert (found - wide).abs().max() <= 1.1 * (original - wide).abs().max() + last_place
    for found, original in zip(mine, other, strict=True):
        assert kind == "norm" or torch.equal(found, original)


@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_a_16_bit_layer_keeps_less(kind: str) -> None:
    plain = layer(kind).bfloat16()
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    hidden = torch.randn(4, 64, 48).bfloat16()
    assert kept_bytes(lean, hidden) < 0.6 * kept_bytes(plain, hidden)


def test_modules_with_other_code_are_left_alone() -> None:
    assert use_lean_layers(GemmaRMSNorm(8)) == 0
    assert use_lean_layers(nn.LayerNorm(8)) == 0

    learned = LlamaMLP(config(8))
    learned.act_fn = ACT2FN["xielu"]
    assert use_lean_layers(learned) == 0

    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert use_lean_layers(Scaled(config(8))) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "phi3"])
def test_a_model_trains_the_same(family: str) -> None:
    sizes = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(sizes)
    lean = copy.deepcopy(plain)
    assert use_lean_layers(lean) >= 5  # two norms a layer and the last
    tokens = torch.randint(1, 64, (2, 9))
    for model in (plain, lean):
        model(input_ids=tokens, labels=tokens).loss.backward()
    for (name, mine), other in zip(lean.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: name + text)
