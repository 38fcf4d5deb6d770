"""Quantization-aware training: linear layers that compute with rounded weights, in any layout.

A layer's own forward runs as it is, transformers' or DeepSpeed's tensor-parallel one, and sees the rounded weight in
the weight's place. Rounded weights aren't kept for the backward pass but made again there, so that ZeRO-3 never holds
more than a layer of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ds_train.compress.rounding import Grid, round_tokens, straight_through
from ds_train.config import RunConfig
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import user_error
from ds_train.models.token_drop import repeated_layers


class Rounding:
    """The rounding of one model's layers; `on` says whether they round from now on."""

    def __init__(self, run: RunConfig, model: PreTrainedModel, group: Any = None) -> None:
        """Let the linear layers of `model` (this rank's part) round. `group`: its tensor ranks."""
        section = run.compress.quantize
        self.on = section.start == 0
        self.grid = Grid(section.bits, section.group)
        self._activations = section.activations != "none"
        # Inside of a checkpointed layer nothing is kept anyway, and its own hooks must see what would be.
        self._again = not run.model.activation_checkpointing
        for module in linear_layers(model):
            cut = getattr(module.weight, "tensor_shard", None)
            ranks = group if cut is not None and cut.dim == 1 else None
            inputs = int(module.weight.shape[-1])
            if ranks is not None and section.group and inputs % section.group:
                reason = f"tensor ranks have {inputs} inputs of a matrix, which it doesn't divide"
                raise user_error("compress.quantize.group", reason, "choose a divisor, or 0", section.group)
            module.forward = partial(self._forward, module, module.forward, ranks)

    def _forward(self, module: Any, forward: Any, ranks: Any, hidden: Tensor) -> Tensor:
        if not self.on:
            return forward(hidden)
        if self._activations:
            hidden = round_tokens(hidden, ranks)
        weight, grid = module.weight, self.grid
        scales = grid.scales(weight, ranks)
        rounded = straight_through(weight, lambda: grid.rounded(weight, scales))
        # Not an assignment to the attribute, which takes nothing but parameters.
        module._parameters["weight"] = rounded
        try:
            if not self._again:
                return forward(hidden)
            place = rounded.untyped_storage().data_ptr()

            def pack(saved: Tensor) -> Any:
                if saved.untyped_storage().data_ptr() == place:
                    return saved.size(), saved.stride(), saved.storage_offset()
                return saved

            def unpack(packed: Any) -> Tensor:
                if isinstance(packed, Tensor):
                    return packed
                return grid.rounded(weight, scales).as_strided(*packed)

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(hidden)
        finally:
            module._parameters["weight"] = weight


def quantized_names(model: PreTrainedModel, section: QuantizeSection) -> list[str]:
    """Names of the linear layers that are quantized in the whole model (its outline will do).

    Raises:
        UserError: the blocks hold matrices that aren't linear layers, or rows that groups don't divide.
    """
    return linear_names(model, section.group, "compress.quantize.group", "compress.quantize.weights")


def linear_names(model: PreTrainedModel, group: int, group_key: str = "", key: str = "") -> list[str]:
    """Names of the linear layers of the model's blocks, whose inputs come in groups of `group` (0: in one).

    Raises:
        UserError: the blocks hold matrices that aren't linear layers, or rows that groups don't divide.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer in repeated_layers(model):
        for module in layer.modules():
            # A parameter that ZeRO-3 has partitioned keeps its real shape beside it.
            shapes = [getattr(one, "ds_shape", one.shape) for one in module.parameters(recurse=False)]
            if any(len(shape) > 2 for shape in shapes) or isinstance(module, Conv1D):
                reason = f"{names[id(module)]} is a {type(module).__name__}, and only linear layers are taken"
                raise user_error(key or "model", reason, "leave it out for this family", model.config.model_type)
            if not isinstance(module, nn.Linear):
                continue
            if group and module.in_features % group:
                reason = f"{names[id(module)]} has {module.in_features} inputs, which it doesn't divide"
                raise user_error(group_key or "--pattern", reason, "choose a divisor, or 0", group)
            found.append(names[id(module)])
    return found


def linear_layers(model: PreTrainedModel) -> list[Any]:
    """The linear layers of the blocks of this rank's part of a model, tensor-parallel ones too."""
    return [module for layer in repeated_layers(model) for module in layer.modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    return isinstance(module, (nn.Linear, LinearAllreduce, LinearLayer))
