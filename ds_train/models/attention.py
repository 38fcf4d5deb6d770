"""Attention by a function of our own for the models that are given one; all others of this process keep transformers'.

The registry of attention functions is one for the whole process. A name of ours in it would have to stand in a model's
config, by which families choose their masks and which is exported; so `sdpa` stays, and asks each module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
"""The registry's name of scaled-dot-product attention."""

_OWN = "own_attention"


def attend_by(model: nn.Module, attention: Callable[..., Any]) -> None:
    """Let scaled-dot-product attention of `model` be computed by `attention`, which takes what the registry's do."""
    for module in model.modules():
        setattr(module, _OWN, attention)
    if ALL_ATTENTION_FUNCTIONS[SDPA] is sdpa_attention_forward:  # else what is there calls `attend`
        ALL_ATTENTION_FUNCTIONS[SDPA] = attend


def attend(module: nn.Module, *states: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention as the model of `module` computes it."""
    attention: Callable[..., Any] = getattr(module, _OWN, sdpa_attention_forward)
    output, _ = attention(module, *states, **options)
    return output, None
