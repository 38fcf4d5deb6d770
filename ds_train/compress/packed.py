"""Rounded weights in the compressed-tensors format, which transformers' `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.compress.distill import PROJECTIONS
from ds_train.compress.qat import quantized_names
from ds_train.compress.rounding import Grid
from ds_train.config.quantize import QuantizeSection


@dataclass(frozen=True)
class Packing:
    """Which weights of a model are packed, and how.

    `names` are those of linear layers; `dtype` is what the model computes in, whose weights are rounded.
    """

    grid: Grid
    activations: bool
    names: frozenset[str]
    dtype: torch.dtype

    @classmethod
    def of(cls, section: QuantizeSection, model: PreTrainedModel) -> Packing:
        """The recipe's, for `model` (its outline will do)."""
        names = frozenset(quantized_names(model, section))
        return cls(Grid(section.bits, section.group), section.activations != "none", names, model.dtype)

    def state(self, state: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A state dict's part with its quantized weights packed.

        Args:
            scales: (O, G) by name of the layer, where they aren't those of round-to-nearest.
        """
        packed: dict[str, Tensor] = {}
        for name, tensor in state.items():
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or layer not in self.names:
                packed[name] = tensor
                continue
            weight = tensor.to(self.dtype)
            own = self.grid.scales(weight) if scales is None else scales[layer]
            packed |= {f"{layer}.{key}": value for key, value in self._packed(weight, own).items()}
        return packed

    def _packed(self, weight_OI: Tensor, scales_OG: Tensor) -> dict[str, Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        integers = self.grid.integers(weight_OI, scales_OG)
        scale = {"weight_scale": scales_OG.to(weight_OI.dtype).contiguous()}
        if self.activations:
            return {"weight": integers, **scale}
        shape = torch.tensor(weight_OI.shape)
        return {"weight_packed": pack_to_int32(integers, self.grid.bits), "weight_shape": shape, **scale}

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        """`quantization_config` of the model's config.json."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        grouped: dict[str, Any] = {"strategy": "channel"}
        if self.grid.group:
            grouped = {"strategy": "group", "group_size": self.grid.group}
        weights = QuantizationArgs(num_bits=self.grid.bits, type="int", symmetric=True, **grouped)
        tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
        form = "int-quantized" if self.activations else "pack-quantized"
        others = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in self.names and not name.startswith(PROJECTIONS)
        ]
        scheme = QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=tokens if self.activations else None, format=form
        )
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=others
        )
        return dict(config.model_dump(mode="json", exclude_none=True))
