"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): ranks share the tokens of a sample.

Everything but attention works on a rank's own tokens. Inside of attention an all-to-all trades tokens for heads: each
rank sees all tokens of its share of the heads. The model's own code makes the masks, told to make them for all tokens.
Shapes: B samples, T tokens of the whole sample, S sequence ranks, H heads, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import _SeqAllToAll
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ds_train.models.attention import SDPA, attend
from ds_train.models.loss import IGNORE_INDEX

Group = Any


class SequenceParallel:
    """Cuts micro-batches along the tokens, for a model whose attention goes through `ALL_ATTENTION_FUNCTIONS`."""

    def __init__(self, group: Group, model: PreTrainedModel) -> None:
        """Raises ValueError where the attention of `model` is another."""
        attention = model.config._attn_implementation
        if attention != SDPA:
            raise ValueError(f"its attention is {attention}, and tokens are exchanged around {SDPA} only")
        self.group = group
        """The ranks that share the tokens of a sample."""
        self._rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def share(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tokens of a micro-batch (B, T) -> (B, T / S), and what the forward pass of them needs.

        Position ids are always given; a padding mask stays whole. The next forward and backward pass belong to it.
        """
        _install()
        whole = self._padded(batch)
        length = whole["input_ids"].shape[1]
        if "position_ids" not in whole:
            whole["position_ids"] = torch.arange(length, device=whole["input_ids"].device).expand_as(whole["input_ids"])
        _ACTIVE.group, _ACTIVE.length = self.group, length
        _ACTIVE.positions_BT = whole["position_ids"] if "attention_mask" not in whole else None
        return {key: value if key == "attention_mask" else self.own(value) for key, value in whole.items()}

    def own(self, whole_BT: Tensor) -> Tensor:
        """This rank's tokens of a tensor of all."""
        length = whole_BT.shape[1]
        start, stop = (number * length // self.ranks for number in (self._rank, self._rank + 1))
        return whole_BT[:, start:stop].contiguous()

    def _padded(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The micro-batch, with padding at the end where its length isn't a multiple of the ranks."""
        missing = -batch["input_ids"].shape[1] % self.ranks
        if not missing:
            return dict(batch)
        filling = {"labels": IGNORE_INDEX}
        return {
            key: torch.nn.functional.pad(value, (0, missing), value=filling.get(key, 0)) for key, value in batch.items()
        }


def leave_sequence() -> None:
    """Back to plain attention, for the next model of this process."""
    _ACTIVE.group = None


class _Active:
    """What the attention of the current micro-batch is shared by; no group means plain attention."""

    group: Group = None
    length = 0
    positions_BT: Tensor | None = None


_ACTIVE = _Active()
_plain_arguments = masking_utils._preprocess_mask_arguments
_plain_packed = masking_utils.packed_sequence_compatibility_function


def _mask_arguments(
    config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, position_ids: Any, *others: Any,
    **more: Any,
) -> Any:  # fmt: skip
    """transformers' look at what a mask is made for, in front of all tokens instead of this rank's."""
    if _ACTIVE.group is not None:
        inputs_embeds = inputs_embeds.new_empty(inputs_embeds.shape[0], _ACTIVE.length, 0)
        position_ids = _ACTIVE.positions_BT
    return _plain_arguments(config, inputs_embeds, attention_mask, past_key_values, position_ids, *others, **more)


def _packed_mask(mask_function: Callable[..., Any], position_ids: Tensor, packed_sequence_mask: Tensor) -> Any:
    """transformers' mask of packed documents, by the positions of all tokens."""
    if _ACTIVE.group is not None and _ACTIVE.positions_BT is not None:
        position_ids = _ACTIVE.positions_BT
    return _plain_packed(mask_function, position_ids, packed_sequence_mask)


def _install() -> None:
    """Put the exchange around scaled-dot-product attention; without an active group it changes nothing."""
    masking_utils._preprocess_mask_arguments = _mask_arguments
    masking_utils.packed_sequence_compatibility_function = _packed_mask
    ALL_ATTENTION_FUNCTIONS[SDPA] = _shared_attention


def _shared_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    group = _ACTIVE.group
    if group is None:
        return attend(module, query, key, value, attention_mask, **options)
    query, key, value = (
        _SeqAllToAll.apply(group, states.transpose(1, 2), 2, 1, 0).transpose(1, 2) for states in (query, key, value)
    )
    output_BTHD, _ = attend(module, query, key, value, attention_mask, **options)
    return _SeqAllToAll.apply(group, output_BTHD, 1, 2, 0), None
