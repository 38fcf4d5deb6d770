"""Models whose layers liger's kernels compute, against the same models as they are.

The kernels run in Triton's interpreter (`make liger-test`) and on a GPU (`make gpu-test`). Everywhere, functions of
torch stand in for them: with their arguments, and writing where they write.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from ds_train.errors import UserError
from ds_train.models.lean import use_lean_layers
from ds_train.models.liger import use_liger


def stand_in(forward: Callable[..., Any], into_inputs: bool = False, into_gradients: bool = False) -> Any:
    """An autograd function that computes `forward`, and leaves its gradients where liger's leave theirs."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.inputs = inputs
            ctx.save_for_backward(*(one for one in inputs if isinstance(one, Tensor)))
            return forward(*(one.detach() if isinstance(one, Tensor) else one for one in inputs))

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            _ = ctx.saved_tensors
            inputs = [one.detach().clone() if isinstance(one, Tensor) else one for one in ctx.inputs]
            wanted = [one.requires_grad_() for one, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            with torch.enable_grad():
                outputs = forward(*inputs)
            found = iter(torch.autograd.grad(outputs, wanted, upstream))
            gradients = [next(found) if needed else None for needed in ctx.needs_input_grad]
            for place, gradient in zip(ctx.inputs, gradients, strict=True):
                if into_inputs and gradient is not None:
                    gradient = place.data.copy_(gradient)
            if into_gradients:
                for place in upstream:
                    place.data.fill_(float("nan"))
            return tuple(gradients)

    return Function


def norm(
    hidden: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str, in_place: bool, _: None
) -> Tensor:
    assert (offset, casting) in ((0.0, "llama"), (1.0, "gemma"))
    assert not in_place
    normal = functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=epsilon)
    return (normal * (offset + weight)).to(hidden.dtype)


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    assert cos.ndim == 3
    return apply_rotary_pos_emb(query, key, cos, sin)


STAND_INS = {
    "rms_norm": ("LigerRMSNormFunction", stand_in(norm)),
    "swiglu": ("LigerSiLUMulFunction", stand_in(lambda gate, up: functional.silu(gate) * up, into_inputs=True)),
    "geglu": (
        "LigerGELUMulFunction",
        stand_in(lambda gate, up: functional.gelu(gate, approximate="tanh") * up, into_inputs=True),
    ),
    "rope": ("LigerRopeFunction", stand_in(rope, into_gradients=True)),
}


def stand_in_everywhere(patch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.ops"):
        patch.setitem(sys.modules, name, ModuleType(name))
    for name, (function, kernel) in STAND_INS.items():
        module = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, function, kernel)
        patch.setitem(sys.modules, module.__name__, module)


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not find_spec("liger_kernel"), reason="make liger-test"
)
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("liger_kernel"), reason="no GPU, or no liger"),
]


@pytest.fixture(
    params=[
        "stand-ins",
        pytest.param("interpreter", marks=INTERPRETED),
        pytest.param("cuda", marks=ON_A_GPU),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-ins":
        stand_in_everywhere(monkeypatch)
    elif request.param == "interpreter":
        from interpreted import interpret

        interpret(monkeypatch)
    return "cuda" if request.param == "cuda" else "cpu"


def small(family: str, **more: Any) -> Any:
    sizes = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, num_local_experts=2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(sizes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.5)
    return model


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "kept"])
@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", 9),  # 2 attentions, 2 feed-forwards, 2 norms a layer and the last
        ("qwen3", 13),  # and norms of queries and keys
        ("gemma", 9),
        ("mixtral", 7),  # experts have a form of their own
        ("phi3", 5),  # rotary positions and feed-forwards too
    ],
)
def test_a_model_trains_the_same(family: str, modules: int, lean: bool, device: str) -> None:
    plain = small(family).to(device)
    fast = copy.deepcopy(plain)
    assert use_liger(fast, keep_products=not lean) == modules
    if lean:
        use_lean_layers(fast)
    tokens = torch.randint(1, 64, (2, 9), device=device)
    # Two documents in a window, so that positions differ between samples.
    positions = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])]).to(device)
    losses = []
    for model in (plain, fast):
        for _ in range(2):
            losses.append(model(input_ids=tokens, position_ids=positions, labels=tokens).loss)
            losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[2].item(), rel=1e-5)
    for (name, mine), other in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other[1].grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_other_models_of_the_process_are_left_alone() -> None:
    plain = small("llama")
    use_liger(small("llama"), keep_products=False)
    tokens = torch.randint(1, 64, (1, 5))
    plain(input_ids=tokens)  # liger isn't there


def test_a_model_without_such_modules_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(UserError, match="liger's kernels compute no module of GPT2LMHeadModel"):
        use_liger(model, keep_products=True)


def test_modules_with_other_code_are_left_alone() -> None:
    class Other(GemmaRMSNorm):
        def _norm(self, x: Tensor) -> Tensor:
            return x

    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", hidden_act="relu", **sizes)
    for module in (Other(8), Scaled(config), LlamaMLP(config)):
        with pytest.raises(UserError):
            use_liger(module, keep_products=True)
