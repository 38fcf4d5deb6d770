"""Rounded weights in the compressed-tensors format, which transformers' `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ds_train.compress.distill import PROJECTIONS
from ds_train.compress.qat import quantized_names
from ds_train.compress.rounding import Grid
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.load import not_waiting
from ds_train.models.look_alike import look_alike

_TOLERANCE, _ROUNDED_TOLERANCE = 1e-5, 0.1  # of the largest logit, fp32; the latter where activations are rounded


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


def save(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the model's config and `state`, its weights, into `folder`."""
    model.config.save_pretrained(folder)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | set(model.all_tied_weights_keys)
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in ignored}
    save_file(revert_weight_conversion(model, kept), folder / "model.safetensors", {"format": "pt"})


def check_loads(section: QuantizeSection, model: PreTrainedModel) -> None:
    """Let a look-alike of `model` (its outline will do) say whether transformers loads what is packed of its family.

    Some families' code looks for the weights of linear layers while a model is loaded, which aren't there then.

    Raises:
        UserError: it doesn't, or that computes something else.
    """
    config: Any = model.config
    try:
        reason = _why_not_loaded(type(model), look_alike(config, 2), section.model_copy(update={"group": 0}))
    except UserError:
        raise
    except Exception:  # no look-alike can be made or run, so that it can't say
        return
    if reason is not None:
        why = f"transformers can't load a packed {config.model_type}: {reason}"
        raise user_error("compress.quantize.weights", why, "leave it out for this family", section.weights)


@torch.no_grad()
def _why_not_loaded(family: Any, config: Any, section: QuantizeSection) -> str | None:
    tokens_BT = torch.arange(3, 11)[None]
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = family(config).eval()
        packing = Packing.of(section, model)
        packed = packing.state(model.state_dict())
        for name in packing.names:
            weight = model.get_submodule(name).weight
            weight.copy_(packing.grid.rounded(weight, packing.grid.scales(weight)))
        expected = model(input_ids=tokens_BT).logits
        model.config.quantization_config = packing.config(model)
        save(model, packed, Path(folder))
        try:
            with not_waiting(), contextlib.redirect_stderr(io.StringIO()):  # bars of progress
                found = family.from_pretrained(folder).eval()(input_ids=tokens_BT).logits
        except Exception as error:  # of the family's own code
            return first_line(error)
    apart = float((found - expected).abs().max() / expected.abs().max())
    near = apart < (_ROUNDED_TOLERANCE if packing.activations else _TOLERANCE)
    return None if near else "it computes something else then"
