"""Attention of 16-bit models on CPUs that multiply bf16 in their vectors (AVX512_BF16): in tiles of ds_kernels.

torch's flash attention takes 31 ms forward and 66 ms backward for 4 x 8 heads of 512 x 64 on one core of an EPYC with
Zen 4, the tiles 11 and 22. What they don't take, such as dropout or a mask of another form, is torch's as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from ds_kernels.attention import attention_library, causal_attention, takes
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_train.models.attention import attend_by


def tiles_are_faster(device: Any, dtype: torch.dtype) -> bool:
    """Whether attention is computed by ds_kernels: bf16 on a CPU that has it in its vectors, and no matrix units.

    A property of the machine and not a measurement, so that a resumed run computes what the first one did.
    """
    fit = torch.device(device).type == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    return fit and not isinstance(attention_library(), Exception)


def use_tiled_attention(model: nn.Module) -> None:
    """Let scaled-dot-product attention of `model` go by tiles."""
    attend_by(model, _attention)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    seen = _keys_seen(module, query, attention_mask, options)
    if seen is None or not takes(query, key, value):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    return causal_attention(query, key, value, seen[0], query.shape[-1] ** -0.5 if scale is None else scale), None


def _keys_seen(
    module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | None] | None:
    """(the first key that each query sees, or None for the first of all); None where attention is another."""
    if options.get("dropout") or any(options.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return None
    if mask is not None:
        first_BT = _first_keys(mask, query.shape[0])
        return None if first_BT is None else (first_BT,)
    asked = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    return (None,) if causal and query.shape[2] > 1 else None


def _first_keys(mask: Tensor, batch: int) -> Tensor | None:
    """The first key of each query, (B, T) int32, where it sees that and all up to itself, and later ones no earlier."""
    # One mask serves all layers.
    known = getattr(mask, "_ds_first_keys", None)
    if known is None:
        mask._ds_first_keys = known = (_ranges(mask, batch),)  # type: ignore[attr-defined]
    return known[0]


def _ranges(mask: Tensor, batch: int) -> Tensor | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    seen_BTT = mask[:, 0]
    first_BT = seen_BTT.to(torch.uint8).argmax(-1)
    place_T = torch.arange(mask.shape[-1])
    expected_BTT = (place_T >= first_BT[..., None]) & (place_T <= place_T[:, None])
    if not torch.equal(seen_BTT, expected_BTT) or bool((first_BT.diff(dim=-1) < 0).any()):
        return None
    return first_BT.to(torch.int32).expand(batch, -1).contiguous()
