"""Patches (arXiv 2407.12665): a model that is given several tokens a position sees their mean embedding.

Shapes: B samples, P patches, K tokens of a patch, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def embed_patches(model: PreTrainedModel) -> None:
    """From now on `model` takes input_ids (B, P, K) too, as P positions; (B, T) as ever.

    Call it behind `deepspeed.initialize`: under ZeRO-3 the embedding is gathered by hooks that must come first.
    """
    embedding: Any = model.get_input_embeddings()

    def before(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        tokens = given.get("input_ids")
        if tokens is None or tokens.dim() != 3:
            return None
        others = {name: value for name, value in given.items() if name != "input_ids"}
        return args, others | {"inputs_embeds": embedding(tokens).mean(2)}

    model.register_forward_pre_hook(before, with_kwargs=True)
