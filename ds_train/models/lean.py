"""Norms and gated feed-forwards that keep less for the backward pass, and compute the rest again there.

Only elementwise work is done twice, never a matrix product, so it costs no time to speak of. A module is taken by what
its code says and not by its name: its `forward` must be, statement by statement, the one of Llama, which most families
share. Shapes: D hidden, F feed-forward; any dimensions before them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


def use_lean_layers(model: nn.Module) -> int:
    """Let the norms and feed-forwards of `model` that are Llama's keep less; returns how many were found.

    Not together with activation checkpointing, whose own hooks on saved tensors these would switch off.
    """
    originals: list[tuple[Any, Callable[..., Tensor]]] = [(LlamaRMSNorm, _norm), (LlamaMLP, _gated)]
    forms = {code_of(original.forward): form for original, form in originals}
    found = 0
    for module in model.modules():
        kind: Any = type(module)
        form = forms.get(code_of(kind.forward))
        activation = getattr(module, "act_fn", None)
        learned = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
        if form is not None and not learned and "forward" not in vars(module):
            module.forward = partial(form, module)  # type: ignore[method-assign]
            found += 1
    return found


@cache
def code_of(function_: Any) -> str:
    """A function's statements, without its name, annotations and docstring; empty where there is no source."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(function_))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(function, ast.FunctionDef):
        return ""
    arguments = [argument.arg for argument in function.args.args]
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return "\n".join([str(arguments), *map(ast.unparse, body)])


def _norm(module: Any, hidden_D: Tensor) -> Tensor:
    return _RootMeanSquareNorm.apply(hidden_D, module.weight, module.variance_epsilon)


class _RootMeanSquareNorm(torch.autograd.Function):
    """`weight * x / rms(x)` (arXiv 1910.07467) in fp32, rounded where Llama rounds; keeps x and its inverse rms."""

    @staticmethod
    def forward(ctx: Any, hidden_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide_D = hidden_D.float()
        inverse = torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden_D, weight_D, inverse)
        return weight_D * (wide_D * inverse).to(hidden_D.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_D, weight_D, inverse = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        normal_D = hidden_D.float() * inverse
        gradient_D = upstream[0].float()
        grad_hidden = grad_weight = None
        if needs_weight:
            grad_weight = (gradient_D * normal_D).flatten(0, -2).sum(0).to(weight_D.dtype)
        if needs_hidden:
            scaled_D = gradient_D * weight_D.float()
            along = (scaled_D * normal_D).mean(-1, keepdim=True)
            grad_hidden = scaled_D.sub_(normal_D.mul_(along)).mul_(inverse).to(hidden_D.dtype)
        return grad_hidden, grad_weight, None


def _gated(module: Any, hidden_D: Tensor) -> Tensor:
    activated = _Activated(module.act_fn)

    def product(gate_F: Tensor, up_F: Tensor) -> Tensor:
        return _GatedProduct.apply(gate_F, up_F, activated)

    def again(gate_F: Tensor, up_F: Tensor) -> Tensor:
        return activated.again(gate_F)[1] * up_F

    return gated(module, hidden_D, product, again)


Product = Callable[[Tensor, Tensor], Tensor]
"""(gate (..., F), up (..., F)) -> their product (..., F), the gate activated."""


def gated(module: Any, hidden_D: Tensor, product: Product, again: Product) -> Tensor:
    """A gated feed-forward that doesn't keep its `product`: `again` gives it to the backward pass, without a graph."""
    gate_F, up_F = module.gate_proj(hidden_D), module.up_proj(hidden_D)
    product_F = product(gate_F, up_F)
    place, size = product_F.untyped_storage().data_ptr(), product_F.numel()
    gate_F, up_F = gate_F.detach(), up_F.detach()

    def pack(saved: Tensor) -> Any:
        # The product, in whatever shape the projection keeps it.
        if saved.untyped_storage().data_ptr() == place and saved.numel() == size:
            return saved.size(), saved.stride()
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return again(gate_F, up_F).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module.down_proj(product_F)


class _Activated:
    """The activation of a gate, worked out once in a backward pass: for the projection's gradient, then for the two."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._made: tuple[Tensor, Tensor] | None = None

    def again(self, gate_F: Tensor) -> tuple[Tensor, Tensor]:
        """The gate, and its activation as a function of that."""
        if self._made is None:
            gate_F = gate_F.detach().requires_grad_()
            with torch.enable_grad():
                self._made = gate_F, self.function(gate_F)
        return self._made

    def last(self, gate_F: Tensor) -> tuple[Tensor, Tensor]:
        """`again`, to keep no longer."""
        made, self._made = self.again(gate_F), None
        return made


class _GatedProduct(torch.autograd.Function):
    """`activation(gate) * up` (arXiv 2002.05202); keeps the two."""

    @staticmethod
    def forward(ctx: Any, gate_F: Tensor, up_F: Tensor, activated: _Activated) -> Tensor:
        ctx.save_for_backward(gate_F, up_F)
        ctx.activated = activated
        return activated.function(gate_F) * up_F

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_F, up_F = ctx.saved_tensors
        gate_F, activated_F = ctx.activated.last(gate_F)
        (grad_gate,) = torch.autograd.grad(activated_F, gate_F, upstream[0] * up_F)
        # Its own graph is over, so that the activation can make room.
        return grad_gate, activated_F.detach().mul_(upstream[0]), None
