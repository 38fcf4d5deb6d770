"""A model of some of another's layers: its config, and whether that says of them what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ds_train.errors import first_line
from ds_train.plan.model_size import of_kept_layers

_PLAIN = (bool, int, float, str, type(None))


def config_of_layers(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The config of a model of the layers `kept` alone.

    `config` is one that transformers has loaded: what older files leave to be computed from a layer's place, such as
    which of Gemma's layers are sliding, is in its lists.

    Raises:
        ValueError: its class doesn't take it, it is one of several models, or there are no such layers.
    """
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} holds a text model among others")
    if max(kept) >= config.num_hidden_layers:
        raise ValueError(f"there is no layer {max(kept)}: they count from 0 to {config.num_hidden_layers - 1}")
    try:
        return type(config).from_dict(of_kept_layers(config.to_dict(), [*kept]))
    except Exception as error:  # every config class validates in its own way
        raise ValueError(f"a {config.model_type} config can't say it: {first_line(error)}") from error


def list_of_layers(model: nn.Module) -> str:
    """Name of the model's list of layers: its longest."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return max(lists, key=lists.__getitem__)


def check_layers(whole: nn.Module, fewer: nn.Module, kept: Sequence[int]) -> None:
    """Compare a model and one of its layers `kept`, outlines will do: modules, sizes, and what they are set to.

    Where a config says what layers are by their places alone, a layer may be another one at a new place.

    Raises:
        ValueError: some layer is.
    """
    prefix = list_of_layers(whole)
    layers: Any = whole.get_submodule(prefix)
    others: Any = fewer.get_submodule(prefix)
    if len(others) != len(kept):
        raise ValueError(f"a config of {len(kept)} layers gives it {len(others)}")
    for place, layer in enumerate(kept):
        anew = partial(_anew, kept=kept, count=len(layers), place=place)
        other = next(_differences(layers[layer], others[place], anew), None)
        if other is not None:
            raise ValueError(f"layer {layer} would be another one at place {place}, where its config has {other}")
    sizes, left = _outside(whole, prefix), _outside(fewer, prefix)
    name = next((name for name in sizes | left if sizes.get(name) != left.get(name)), None)
    if name is not None:
        raise ValueError(f"{name}, outside of its layers, has a share for each of them")


def _outside(model: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in model.state_dict().items() if not name.startswith(f"{prefix}.")}


def _anew(value: Any, kept: Sequence[int], count: int, place: int) -> Any:
    """A setting of layer `kept[place]` where it is at `place`, of a model that had `count` layers."""
    if isinstance(value, (list, tuple)) and len(value) == count:
        return type(value)(value[layer] for layer in kept)
    return {kept[place]: place, count: len(kept)}.get(value, value) if type(value) is int else value  # no bool


def _differences(before: nn.Module, after: nn.Module, anew: Callable[[Any], Any]) -> Iterator[str]:
    """What differs between two modules, but for settings that are places or numbers of layers and are those `anew`."""
    modules, others = dict(before.named_modules()), dict(after.named_modules())
    for name in modules | others:
        one, other = modules.get(name), others.get(name)
        if one is None or other is None or type(one) is not type(other):
            kinds = [type(module).__name__ if module is not None else "nothing" for module in (other, one)]
            yield f"{kinds[0]} instead of {kinds[1]} as its {name or 'form'}"
            return
        ours, theirs = _settings(one), _settings(other)
        for key in ours | theirs:
            old, new = ours.get(key), theirs.get(key)
            if new != old and new != anew(old):
                yield f"{new} instead of {old} as its {f'{name}.' if name else ''}{key}"


def _settings(module: nn.Module) -> dict[str, Any]:
    """Sizes of a module's own parameters and buffers, and its attributes that are plain values or lists of these."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    plain = {
        key: value
        for key, value in own.items()
        if all(isinstance(one, _PLAIN) for one in (value if isinstance(value, (list, tuple)) else [value]))
    }
    return plain | {name: tuple(tensor.shape) for name, tensor in tensors}
