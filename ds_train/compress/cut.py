"""A model without some of its units: its config, and which elements of the whole model its parameters are."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from ds_train.compress.coupling import EXPERTS, FFN, HEADS, HIDDEN, LAYERS, OF_MODEL, Removed, Structure
from ds_train.errors import first_line
from ds_train.plan.model_size import said_of_layers

_FFN_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class WholeTensors(Protocol):
    """Where a whole model's tensors come from: a checkpoint's files, for one."""

    shapes: Any
    """What has a `whole` size, by the name of each parameter."""

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter, or a state of it."""


def size_of(config: PreTrainedConfig, kind: str) -> int:
    """Units of a layer or of the model that the config says: key/value heads (with their queries), channels, layers.

    Raises:
        ValueError: it says nothing of them.
    """
    if kind == LAYERS:
        return int(config.num_hidden_layers)
    if kind == HIDDEN:
        return int(config.hidden_size)
    if kind == HEADS:
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if heads is None:
            raise ValueError(f"a {config.model_type} config says nothing of its {kind}")
        return int(heads)
    value = getattr(config, _key(config, kind))
    if isinstance(value, Sequence):
        if len(set(value)) != 1:
            raise ValueError(f"its layers have different numbers of {kind} already")
        value = value[0]
    return int(value) if value else 4 * int(config.hidden_size)  # GPT-2's default


def heads_tie_hidden(config: PreTrainedConfig) -> bool:
    """Whether the config has no head size of its own: it is the hidden size over the number of heads."""
    return "head_dim" not in config.to_dict()


def resized(
    config: PreTrainedConfig, sizes: Mapping[str, int | Sequence[int]], layers: Sequence[int] | None = None
) -> PreTrainedConfig:
    """The config with other sizes, by kind.

    Args:
        sizes: of FFN it may be a size for each layer that stays.
        layers: the layers that stay, for settings that have a value for each; all without it.

    Raises:
        ValueError: the family's config doesn't take them.
    """
    given = config.to_dict()
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type"):
        given.pop(name, None)

    def put(name: str, value: int | list[int]) -> None:
        given[config.attribute_map.get(name, name)] = value

    one = {kind: size for kind, size in sizes.items() if isinstance(size, int)}
    each = {kind: list(size) for kind, size in sizes.items() if not isinstance(size, int)}
    if set(each) - {FFN}:
        raise ValueError(f"layers would be left with different numbers of {' and '.join(each)}")
    if HEADS in one or HIDDEN in one:
        _put_widths(config, one, given, put)
    if FFN in one:
        put(_key(config, FFN), one[FFN])
    if EXPERTS in one:
        least = int(getattr(config, "num_experts_per_tok", None) or 1)
        if one[EXPERTS] < least:
            raise ValueError(f"a token visits {least} experts, and {one[EXPERTS]} would be left")
        put(_key(config, EXPERTS), one[EXPERTS])
    if layers is not None:
        given |= said_of_layers(given, config.num_hidden_layers, layers)
        put("num_hidden_layers", len(layers))
    if FFN in each:
        put(_key(config, FFN), each[FFN])
    try:
        made = type(config)(**copy.deepcopy(given))
    except Exception as error:  # every config class validates in its own way
        if each:
            raise ValueError(f"a {config.model_type} config has one number of its ffn for all layers") from error
        raise ValueError(f"{config.model_type}: {first_line(error)}") from error
    made.use_cache = config.use_cache
    return made


def _put_widths(config: PreTrainedConfig, sizes: Mapping[str, int], given: dict[str, Any], put: Any) -> None:
    """Heads and hidden size, with everything that would follow from them held as it is."""
    groups = getattr(config, "num_key_value_heads", None)
    queries = config.num_attention_heads // (groups or config.num_attention_heads)
    head_size = given.get("head_dim") or config.hidden_size // config.num_attention_heads
    heads, hidden = queries * sizes.get(HEADS, size_of(config, HEADS)), sizes.get(HIDDEN, config.hidden_size)
    if not heads_tie_hidden(config):
        given["head_dim"] = head_size
    elif heads * head_size != hidden:
        reason = f"a {config.model_type} config ties the size of a head to their number and the hidden size"
        raise ValueError(f"{reason}, so heads and hidden go together, the same share of both")
    put("num_attention_heads", heads)
    if groups is not None:
        put("num_key_value_heads", heads // queries)
    if HIDDEN in sizes:
        if any(config.attribute_map.get(name, name) in given for name in _FFN_KEYS):
            put(_key(config, FFN), sizes.get(FFN, size_of(config, FFN)))
        put("hidden_size", hidden)


def _key(config: PreTrainedConfig, kind: str) -> str:
    known = config.to_dict()
    keys = _FFN_KEYS if kind == FFN else _EXPERT_KEYS
    key = next((key for key in keys if config.attribute_map.get(key, key) in known), None)
    if key is None:
        raise ValueError(f"a {config.model_type} config says nothing of its {kind}")
    return key


class Cut:
    """A model without its `removed` units: which elements of the whole model each of its parameters has."""

    def __init__(self, structure: Structure, removed: Removed) -> None:
        """
        Raises:
            ValueError: a layer would be left with nothing.
        """
        self._structure = structure
        gone = set(removed.get(LAYERS, {}).get(0, ()))
        self.layers = [layer for layer in range(structure.count) if layer not in gone]
        """Layers that stay."""
        self.sizes: dict[str, int | list[int]] = {}
        """Units that stay, in each layer or in the model, by kind; a list where layers keep different numbers."""
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        if not self.layers:
            raise ValueError("no layer would be left")
        counts: dict[str, list[int]] = {}
        for coupling in structure.couplings:
            if coupling.kind == LAYERS or (coupling.kind not in OF_MODEL and coupling.number in gone):
                continue
            out = set(removed.get(coupling.kind, {}).get(coupling.number, ()))
            kept = [unit for unit in range(coupling.units) if unit not in out]
            counts.setdefault(coupling.kind, []).append(len(kept))
            if not kept:
                raise ValueError(f"a layer would be left without {coupling.kind}")
            for member in coupling.members if out else ():
                places = member.indices(kept, coupling.units)
                self._places.setdefault(member.name, []).append((member.dim, places))
        for kind, each in counts.items():
            self.sizes[kind] = each if len(set(each)) > 1 else each[0]

    @property
    def left(self) -> dict[str, int | list[int]]:
        """Units that stay by kind, layers too."""
        return {**self.sizes, "layers": len(self.layers)}

    @property
    def words(self) -> str:
        """The same for people."""
        return ", ".join(f"{kind} {count}" for kind, count in self.left.items())

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The smaller model's config, from the whole one's.

        Raises:
            ValueError: the family's config doesn't take the sizes.
        """
        return config_after(config, self.record())

    def record(self) -> dict[str, Any]:
        """What `config_after` has to know, as plain values."""
        fewer = self.layers if len(self.layers) < self._structure.count else None
        return {"cut": True, "sizes": self.sizes, "layers": fewer}

    def origin(self, name: str) -> str:
        """The name in the whole model of a parameter of the smaller one."""
        layer = self._structure.layer_of(name)
        if layer is None:
            return name
        prefix = f"{self._structure.layers}."
        return f"{prefix}{self.layers[layer]}{name[len(f'{prefix}{layer}') :]}"

    def names(self, whole: Sequence[str]) -> list[str]:
        """Names in the smaller model of the parameters `whole` of the whole one, those that are left."""
        prefix, names = f"{self._structure.layers}.", []
        for name in whole:
            layer = self._structure.layer_of(name)
            if layer is None:
                names.append(name)
            elif layer in self.layers:
                names.append(f"{prefix}{self.layers.index(layer)}{name[len(f'{prefix}{layer}') :]}")
        return names

    def apply(self, origin: str, whole: Tensor) -> Tensor:
        """What is left of a parameter (or a state of it) of the whole model."""
        for dim, indices in self._places.get(origin, ()):
            whole = whole.index_select(dim, indices.to(whole.device))
        return whole

    def shape(self, origin: str, whole: Sequence[int]) -> tuple[int, ...]:
        """The size that is left of a parameter of the whole model."""
        size = list(whole)
        for dim, indices in self._places.get(origin, ()):
            size[dim] = len(indices)
        return tuple(size)

    def parameters(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Elements that are left of parameters of these whole sizes."""
        origins = map(self.origin, self.names(list(shapes)))
        return sum(math.prod(self.shape(name, shapes[name])) for name in origins)


def config_after(config: PreTrainedConfig, record: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a run's model, from the whole one's, after what its checkpoint says of its pruning."""
    return resized(config, record["sizes"], record["layers"]) if record.get("cut") else config


class CutSource:
    """What a checkpoint of the whole model holds of the smaller one (a `Source` of checkpoint/fragments.py)."""

    def __init__(self, cut: Cut, files: WholeTensors) -> None:
        self._cut, self._files = cut, files
        self.shapes = dict.fromkeys(cut.names(list(files.shapes)))
        """Names of the smaller model's parameters."""

    def read(self, name: str, kind: str, shape: Any, shard: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` - 1 of a shard of `shape`, flattened.

        Raises:
            ValueError: the smaller model has another size.
        """
        left = self.whole(name, kind)
        if tuple(left.shape) != shape.whole:
            raise ValueError(f"{name} is left with the shape {tuple(left.shape)} and has {shape.whole} here")
        return (left if shape.cut is None else shape.cut.cut(left, shard, shape.shards)).reshape(-1)[start:stop]

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter of the smaller model, or a state of it."""
        origin = self._cut.origin(name)
        return self._cut.apply(origin, self._files.whole(origin, kind))
