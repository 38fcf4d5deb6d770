"""A trained transformers folder made smaller on one process: rounded or thinned out, with samples or without.

Shapes: B samples, T tokens, N tokens in all, I inputs of a layer.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ds_train.compress.gptq import gptq
from ds_train.compress.packed import Packing
from ds_train.compress.qat import linear_names
from ds_train.compress.sparsity import Pattern, Score, thin
from ds_train.compress.teacher import first_tensor
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import first_line, user_error
from ds_train.models.token_drop import repeated_layers

Method = Literal["rtn", "gptq"]


def quantize_folder(
    source: Path, folder: Path, section: QuantizeSection, method: Method, batches: Sequence[Mapping[str, Tensor]] = ()
) -> tuple[int, int]:
    """Write the model in `source` with rounded weights to `folder`; (bytes of the weights before, after).

    Args:
        batches: what the model is shown for `gptq`, without labels.

    Raises:
        UserError: no model can be loaded from there, or its layers can't be rounded so.
    """
    model = _load(source)
    packing = Packing.of(section, model)
    scales: dict[str, Tensor] | None = None
    if method == "gptq":
        scales = {}

        def rounded(name: str, weight: Tensor, products: Tensor) -> Tensor:
            values, scales[name] = gptq(weight, products, packing.grid)
            return values

        _layer_by_layer(model, packing.names, batches, rounded)
    model.config.quantization_config = packing.config(model)
    _write(model, packing.state(model.state_dict(), scales), source, folder)
    return _bytes(source), _bytes(folder)


def thin_folder(
    source: Path, folder: Path, pattern: Pattern, score: Score, batches: Sequence[Mapping[str, Tensor]] = ()
) -> float:
    """Write the model in `source` with zeros in its blocks' linear weights to `folder`; the share of zeros there.

    Args:
        batches: what the model is shown for other scores than `magnitude`, without labels.

    Raises:
        UserError: no model can be loaded from there, or the pattern doesn't fit its layers.
    """
    model = _load(source)
    linear = {f"{name}.weight" for name in linear_names(model, pattern.group)}
    if score == "magnitude":
        for name, parameter in model.named_parameters():
            if name in linear:
                parameter.data = thin(parameter.data, None, pattern, score)
    else:
        names = frozenset(name.removesuffix(".weight") for name in linear)
        _layer_by_layer(model, names, batches, lambda _, weight, products: thin(weight, products, pattern, score))
    _write(model, model.state_dict(), source, folder)
    weights = [parameter for name, parameter in model.named_parameters() if name in linear]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def _write(model: Any, state: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """The model's config and weights, and all else that lies in `source`."""
    written = folder.with_name(folder.name + ".partial")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    model.config.save_pretrained(written)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | set(model.all_tied_weights_keys)
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in ignored}
    save_file(revert_weight_conversion(model, kept), written / "model.safetensors", {"format": "pt"})
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (written / path.name).exists():
            shutil.copy(path, written / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)


def _load(source: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are packed integers already")
        (name,) = config.architectures or ("",)
        kind: Any = getattr(transformers, name)
        return kind.from_pretrained(source, config=config, dtype="auto").eval()
    except (OSError, ValueError, AttributeError) as error:
        fix = "give a run's folder, or a transformers folder"
        reason = f"no model can be loaded from there ({first_line(error)})"
        raise user_error("quantize", reason, fix, str(source)) from error


@torch.no_grad()
def _layer_by_layer(
    model: Any, chosen: Collection[str], batches: Sequence[Mapping[str, Tensor]],
    change: Callable[[str, Tensor, Tensor], Tensor],
) -> None:  # fmt: skip
    """Change the weights of the `chosen` linear layers, each for the inputs that the changed layers before it give.

    Args:
        change: (name, weight (O, I), sum of the inputs' products (I, I)) -> the new weight.
    """
    layers = repeated_layers(model)
    calls = _calls(model, layers, batches)
    states = [args[0] for args, _ in calls[0]]
    masks = [batch.get("attention_mask") for batch in batches]
    names = {id(module): name for name, module in model.named_modules()}
    for layer, given in zip(layers, calls, strict=True):
        linear: list[Any] = [module for module in layer.modules() if names.get(id(module)) in chosen]
        products = _products(layer, linear, states, given, masks)
        for module in linear:
            module.weight.copy_(change(names[id(module)], module.weight, products[id(module)]))
        states = [_output(layer, *call) for call in zip(states, given, strict=True)]


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with; its hidden states come first."""


def _calls(model: Any, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> list[list[_Call]]:
    """What each layer is called with for each micro-batch; the hidden states are those of the first layer alone."""
    calls: list[list[_Call]] = [[] for _ in layers]

    def note(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = list(inspect.signature(type(layer).forward).parameters)[1]
        hidden = args[0] if args else kwargs[first]
        others = {name: value for name, value in kwargs.items() if name != first}
        calls[number].append(((hidden if number == 0 else None, *args[1:]), others))

    handles = [
        layer.register_forward_pre_hook(partial(note, number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    try:
        for batch in batches:
            model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _output(layer: nn.Module, hidden_BTD: Tensor, call: _Call) -> Tensor:
    args, kwargs = call
    return first_tensor(layer(hidden_BTD, *args[1:], **kwargs))


def _products(
    layer: nn.Module, linear: Sequence[nn.Module], states: Sequence[Tensor], calls: Sequence[_Call],
    masks: Sequence[Tensor | None],
) -> dict[int, Tensor]:  # fmt: skip
    """Sum over all tokens of x x^T, (I, I) fp32, for the inputs x of each module; padding counts for nothing."""
    sums: dict[int, Tensor] = {}
    current: list[Tensor | None] = [None]

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs, (mask,) = args[0], current
        if mask is not None and mask.shape == inputs.shape[:2]:
            inputs = inputs[mask.bool()]
        inputs_NI = inputs.reshape(-1, inputs.shape[-1]).float()
        own = inputs_NI.t() @ inputs_NI
        sums[id(module)] = sums[id(module)].add_(own) if id(module) in sums else own

    handles = [module.register_forward_pre_hook(add) for module in linear]
    try:
        for hidden_BTD, call, current[0] in zip(states, calls, masks, strict=True):
            _output(layer, hidden_BTD, call)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
