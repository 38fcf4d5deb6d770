"""Norms, gated feed-forwards and rotary positions by the Triton kernels of liger-kernel (arXiv 2410.10989), on CUDA.

Modules are taken by their code, as in lean.py, and one model at a time: liger's own patches replace classes and
functions of transformers for the whole process, and in the families that it lists. The loss isn't liger's: that of
loss.py never holds all logits either, takes heads that are cut over ranks, and is the same on every device.
Shapes: B samples, H heads, T tokens, D head or hidden, F feed-forward; any dimensions before D and F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from ds_train.errors import user_error
from ds_train.models.lean import code_of, gated

_ROTARY = apply_rotary_pos_emb.__name__


def use_liger(model: nn.Module, keep_products: bool) -> int:
    """Let liger compute what it can of `model`; returns how many modules that is.

    Args:
        keep_products: of gated feed-forwards, for the backward pass, or compute them again there. They must be kept
            under activation checkpointing (lean.py).

    Raises:
        UserError: there is no such module.
    """
    found = 0
    for module in model.modules():
        forward = None if "forward" in vars(module) else _form(module, keep_products)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
            found += 1
    if not found:
        raise user_error(
            "model.liger", f"liger's kernels compute no module of {type(model).__name__}", "set false", "true"
        )
    return found


def _form(module: Any, keep_products: bool) -> Callable[..., Any] | None:
    kind: Any = type(module)
    code = code_of(kind.forward)
    if code == code_of(LlamaRMSNorm.forward):
        return partial(_norm, module)
    if code == code_of(GemmaRMSNorm.forward) and code_of(kind._norm) == code_of(GemmaRMSNorm._norm):
        return partial(_norm_around_one, module)
    if code == code_of(LlamaMLP.forward):
        return _gated_form(module, keep_products)
    rotary = getattr(kind.forward, "__globals__", {}).get(_ROTARY)
    if rotary is None or hasattr(kind.forward, "__wrapped__") or _ROTARY not in kind.forward.__code__.co_names:
        return None
    return _with_rotary(module) if code_of(rotary) == code_of(apply_rotary_pos_emb) else None


def _norm(module: Any, hidden_D: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: the gradient that arrives may be another branch's too.
    return LigerRMSNormFunction.apply(hidden_D, module.weight, module.variance_epsilon, 0.0, "llama", False, None)


def _norm_around_one(module: Any, hidden_D: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_D, module.weight, module.eps, 1.0, "gemma", False, None)


def _gated_form(module: Any, keep_products: bool) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        product = _silu_product
    elif isinstance(module.act_fn, GELUTanh):
        product = _gelu_product
    else:
        return None

    def keeping(hidden_D: Tensor) -> Tensor:
        return module.down_proj(product(module.gate_proj(hidden_D), module.up_proj(hidden_D)))

    return keeping if keep_products else partial(gated, module, product=product, again=product)


def _silu_product(gate_F: Tensor, up_F: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate_F, up_F)


def _gelu_product(gate_F: Tensor, up_F: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate_F, up_F)


def _with_rotary(module: Any) -> Callable[..., Any]:
    """The forward of an attention module, in which the one name means liger's function."""
    forward = type(module).forward
    own = FunctionType(
        forward.__code__, {**forward.__globals__, _ROTARY: _rotate}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = forward.__kwdefaults__
    return partial(own, module)


def _rotate(
    query_BHTD: Tensor, key_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions (arXiv 2104.09864), in their own memory where its order is B T H D."""
    from liger_kernel.ops.rope import LigerRopeFunction

    if unsqueeze_dim != 1:
        return apply_rotary_pos_emb(query_BHTD, key_BHTD, cos_BTD, sin_BTD, unsqueeze_dim)
    return LigerRopeFunction.apply(query_BHTD, key_BHTD, cos_BTD, sin_BTD)
