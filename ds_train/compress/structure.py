"""What of a model can be cut together, found from its config and its shapes, and proved on a small look-alike.

A stock config says how many heads, feed-forward channels and layers there are. Two outlines of the model whose configs
differ by one of them show which dimension of which parameter belongs to it; the order of units within a dimension is
tried until a look-alike with some units masked and one without them compute the same. What can't be proved isn't cut.
Shapes: U units of a layer.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ds_train.config import RunConfig
from ds_train.errors import first_line
from ds_train.models.load import build_model, outline
from ds_train.models.look_alike import per_layer, small_run

HEADS, FFN, LAYERS = "heads", "ffn", "layers"
KINDS = (HEADS, FFN, LAYERS)

_FFN_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_NUMBER = re.compile(r"\.(\d+)\.")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter in which every unit has `each` elements: in each of `parts` equal stretches of the
    dimension, `each / parts` in a row."""

    name: str
    dim: int
    each: int
    parts: int = 1

    def indices(self, kept: Sequence[int], units: int) -> Tensor:
        """Where the elements of units `kept`, of `units`, lie in the dimension."""
        row = self.each // self.parts
        inside = torch.tensor(kept)[:, None] * row + torch.arange(row)
        return torch.cat([inside.flatten() + part * units * row for part in range(self.parts)])


@dataclass(frozen=True)
class Coupling:
    """Units of one layer that go together. `gate` is the member that reads their output: the input of a matrix."""

    kind: str
    layer: int
    units: int
    members: tuple[Member, ...]
    gate: Member

    @property
    def module(self) -> str:
        """Name of the module whose input the units are; its channels are the units', in a row each."""
        return self.gate.name.rpartition(".")[0]


@dataclass(frozen=True)
class Structure:
    """The couplings of a model by kind, layers in order; `layers` is the name of the list of layers."""

    couplings: dict[str, tuple[Coupling, ...]]
    layers: str
    count: int

    def layer_of(self, name: str) -> int | None:
        """Number of the layer that a parameter belongs to; None outside of the layers."""
        match = re.match(re.escape(self.layers) + r"\.(\d+)\.", name)
        return int(match[1]) if match else None


Removed = Mapping[str, Mapping[int, Sequence[int]]]
"""Units that go, by kind and layer; of the kind `layers` the layers themselves, as the units of layer 0."""


def find_structure(run: RunConfig, config: PreTrainedConfig, kinds: Iterable[str]) -> Structure:
    """What of the model can go, for each of `kinds`, proved on a look-alike.

    Raises:
        ValueError: the family's config can't say it, or the look-alike doesn't prove it.
    """
    kinds = tuple(kinds)
    small, small_config = small_run(run, config, layers=4)
    found = _couplings(run, config, kinds)
    order = _prove(small, small_config, _couplings(small, small_config, kinds))
    couplings = {
        kind: tuple(_with_parts(coupling, order) for coupling in of_kind) for kind, of_kind in found.couplings.items()
    }
    return replace(found, couplings=couplings)


def resized(
    config: PreTrainedConfig, sizes: Mapping[str, int], layers: Sequence[int] | None = None
) -> PreTrainedConfig:
    """The config with other numbers of heads, channels or layers: `heads`, `ffn`, `layers`.

    Args:
        layers: the layers that stay, for settings that have a value for each; all in order without it.

    Raises:
        ValueError: the family's config doesn't take them.
    """
    given = config.to_dict()
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type"):
        given.pop(name, None)

    def put(name: str, value: int) -> None:
        given[config.attribute_map.get(name, name)] = value

    if HEADS in sizes:
        groups = getattr(config, "num_key_value_heads", None)
        if "head_dim" not in given:
            reason = f"a {config.model_type} config ties the size of a head to their number"
            raise ValueError(f"{reason}, so no stock model has fewer of them")
        given["head_dim"] = given["head_dim"] or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // (groups or config.num_attention_heads)
        put("num_attention_heads", queries * sizes[HEADS])
        if groups is not None:
            put("num_key_value_heads", sizes[HEADS])
    if FFN in sizes:
        put(_ffn_key(config), sizes[FFN])
    if layers is not None:
        for key, value in per_layer(given, config.num_hidden_layers).items():
            given[key] = [value[index] for index in layers]
        put("num_hidden_layers", len(layers))
    try:
        made = type(config)(**copy.deepcopy(given))
    except Exception as error:  # every config class validates in its own way
        raise ValueError(f"{config.model_type}: {first_line(error)}") from error
    made.use_cache = config.use_cache
    return made


def size_of(config: PreTrainedConfig, kind: str) -> int:
    """Units of a layer, or layers, that the config says: key/value heads (with their queries), channels, layers."""
    if kind == LAYERS:
        return int(config.num_hidden_layers)
    if kind == HEADS:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    key = _ffn_key(config)
    value = getattr(config, key)
    return int(value) if value else 4 * int(config.hidden_size)  # GPT-2's default


class Cut:
    """A model without its `removed` units: which elements of the whole model each of its parameters has."""

    def __init__(self, structure: Structure, removed: Removed) -> None:
        """Raises:
        ValueError: layers would be left with different sizes, or with nothing.
        """
        self._structure = structure
        gone = set(removed.get(LAYERS, {}).get(0, ()))
        self.layers = [layer for layer in range(structure.count) if layer not in gone]
        """Layers that stay."""
        self.sizes: dict[str, int] = {}
        """Units of a layer that stay, by kind."""
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        if not self.layers:
            raise ValueError("no layer would be left")
        for kind, couplings in structure.couplings.items():
            for coupling in couplings:
                if coupling.layer in self.layers:
                    self._add(coupling, removed.get(kind, {}).get(coupling.layer, ()))

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The smaller model's config, from the whole one's.

        Raises:
            ValueError: the family's config doesn't take the sizes.
        """
        fewer = self.layers if len(self.layers) < self._structure.count else None
        return resized(config, self.sizes, fewer)

    def origin(self, name: str) -> str:
        """The name in the whole model of a parameter of the smaller one."""
        layer = self._structure.layer_of(name)
        if layer is None:
            return name
        prefix = f"{self._structure.layers}."
        return f"{prefix}{self.layers[layer]}{name[len(f'{prefix}{layer}') :]}"

    def apply(self, origin: str, whole: Tensor) -> Tensor:
        """What is left of a parameter (or a state of it) of the whole model."""
        for dim, indices in self._places.get(origin, ()):
            whole = whole.index_select(dim, indices)
        return whole

    def _add(self, coupling: Coupling, removed: Sequence[int]) -> None:
        kept = sorted(set(range(coupling.units)) - set(removed))
        if self.sizes.setdefault(coupling.kind, len(kept)) != len(kept):
            raise ValueError(f"layers would be left with different numbers of {coupling.kind}")
        if not kept:
            raise ValueError(f"layer {coupling.layer} would be left without {coupling.kind}")
        if len(kept) < coupling.units:
            for member in coupling.members:
                self._places.setdefault(member.name, []).append((member.dim, member.indices(kept, coupling.units)))


class Masks:
    """Multiplies units' outputs, and what layers add, by numbers from 0 (as if cut) to 1 (as it was)."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        local: Callable[[nn.Module, Tensor], Tensor] = lambda _, all_: all_,
    ) -> None:
        """
        Args:
            model: the model, or the part of it that is here; what is elsewhere is passed over.
            local: gives of the values of all channels those of a gate's module here (its tensor rank's).
        """
        self._local = local
        self._values: dict[str, Tensor | None] = {}
        self._couplings = {
            (kind, coupling.layer): coupling for kind in structure.couplings for coupling in structure.couplings[kind]
        }
        self._modules = dict(model.named_modules())
        self._layers = structure.layers
        for coupling in self._couplings.values():
            module = self._modules.get(coupling.module)
            if module is not None:
                module.register_forward_pre_hook(self._mask_input(coupling.module))
        for layer in range(structure.count):
            module = self._modules.get(f"{structure.layers}.{layer}")
            if module is not None and any(True for _ in module.parameters()):
                module.register_forward_hook(self._mask_change(f"{structure.layers}.{layer}"), with_kwargs=True)

    def set(self, kind: str, layer: int, values: Sequence[float]) -> None:
        """Give the units of a layer their values; of the kind `layers`, the layer its one value."""
        name = f"{self._layers}.{layer}" if kind == LAYERS else self._couplings[kind, layer].module
        module = self._modules.get(name)
        if module is None:
            return
        if all(value == 1.0 for value in values):
            self._values.pop(name, None)
            return
        mask = torch.tensor(values, dtype=torch.float32)
        if kind != LAYERS:
            mask = mask.repeat_interleave(self._couplings[kind, layer].gate.each)
            mask = mask if self._local is None else self._local(module, mask)
        self._values[name] = mask

    def _mask_input(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            mask = self._values.get(name)
            if mask is None:
                return None
            return inputs[0] * mask.to(inputs[0]), *inputs[1:]

        return hook

    def _mask_change(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            mask = self._values.get(name)
            if mask is None:
                return None
            before = inputs[0] if inputs else options["hidden_states"]
            hidden = output[0] if isinstance(output, tuple) else output
            changed = before + (hidden - before) * mask.to(hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


def _ffn_key(config: PreTrainedConfig) -> str:
    known = config.to_dict()
    key = next((key for key in _FFN_KEYS if config.attribute_map.get(key, key) in known), None)
    if key is None:
        raise ValueError(f"a {config.model_type} config says nothing of feed-forward channels")
    return key


def _couplings(run: RunConfig, config: PreTrainedConfig, kinds: Iterable[str]) -> Structure:
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} holds a text model among others; train that by itself")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder and a decoder, whose layers have one config")
    whole = outline(run, config)
    shapes = _shapes(whole)
    layers = _layer_list(shapes, _shapes(outline(run, resized(config, {}, range(1)))), config)
    structure = Structure({}, layers, size_of(config, LAYERS))
    couplings = {kind: tuple(_of_kind(whole, shapes, structure, run, config, kind)) for kind in kinds if kind != LAYERS}
    return replace(structure, couplings=couplings)


def _of_kind(
    whole: PreTrainedModel, shapes: dict[str, tuple[int, ...]], structure: Structure, run: RunConfig,
    config: PreTrainedConfig, kind: str,
) -> Iterator[Coupling]:  # fmt: skip
    units = size_of(config, kind)
    if units < 2:
        raise ValueError(f"there is only one of its {kind} in a layer")
    fewer, missing = _outline_of_fewer(run, config, kind, units)
    members: dict[int, list[Member]] = {}
    for name, shape in shapes.items():
        for dim, (size, less) in enumerate(zip(shape, fewer[name], strict=True)):
            layer = structure.layer_of(name)
            if size == less:
                continue
            each = (size - less) // missing
            if layer is None or size != each * units or less != each * (units - missing):
                raise ValueError(f"{name} doesn't have the same share for each of its {kind}")
            members.setdefault(layer, []).append(Member(name, dim, each))
    if not members:
        raise ValueError(f"none of its parameters has a share for each of its {kind}")
    for layer, of_layer in sorted(members.items()):
        gates = [member for member in of_layer if _reads(whole, member)]
        if len(gates) != 1:
            what = (
                "a mixture of experts" if any(len(shapes[member.name]) > 2 for member in of_layer) else "no plain one"
            )
            raise ValueError(f"the {kind} of layer {layer} aren't the input of one matrix: it is {what}")
        yield Coupling(kind, layer, units, tuple(of_layer), gates[0])


def _outline_of_fewer(
    run: RunConfig, config: PreTrainedConfig, kind: str, units: int
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the model with fewer units, and how many fewer: one, or as few as its config takes."""
    refusal: ValueError | None = None
    for left in (units - 1, *(count for count in range(units - 2, 0, -1) if units % count == 0)):
        try:
            return _shapes(outline(run, resized(config, {kind: left}))), units - left
        except ValueError as error:
            refusal = refusal or error
    raise refusal or ValueError(f"there is only one of its {kind}")


def _reads(model: PreTrainedModel, member: Member) -> bool:
    """Whether the member is the input of a matrix."""
    path, _, attribute = member.name.rpartition(".")
    module = model.get_submodule(path)
    if attribute != "weight":
        return False
    return (isinstance(module, nn.Linear) and member.dim == 1) or (isinstance(module, Conv1D) and member.dim == 0)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _layer_list(
    shapes: Mapping[str, tuple[int, ...]], of_one: Mapping[str, tuple[int, ...]], config: PreTrainedConfig
) -> str:
    """Name of the list of layers: what has numbers that a model of one layer lacks."""
    if config.num_hidden_layers < 2:
        raise ValueError("a model of one layer has none to compare")
    lists = set()
    for name in shapes.keys() - of_one.keys():
        match = _NUMBER.search(name)
        lists.add(name[: match.start()] if match else "")
    if len(lists) != 1 or "" in lists:
        raise ValueError("its layers aren't one list")
    return lists.pop()


def _general(name: str) -> str:
    return _NUMBER.sub(".*.", name, count=1)


def _with_parts(coupling: Coupling, order: Mapping[tuple[str, int], int]) -> Coupling:
    members = tuple(
        replace(member, parts=order.get((_general(member.name), member.dim), 1)) for member in coupling.members
    )
    return replace(coupling, members=members)


def _prove(run: RunConfig, config: PreTrainedConfig, structure: Structure) -> dict[tuple[str, int], int]:
    """Stretches of each kind of member (by its name without a layer's number, and dimension), where there are several.

    Raises:
        ValueError: no order makes the cut look-alike compute what the masked one does.
    """
    model: Any = build_model(run, config, {}, 0).eval()
    # Norms of ones and biases of zeros would hide mistakes.
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    tokens_BT = torch.randint(3, int(config.vocab_size), (2, 12), generator=draw)
    order: dict[tuple[str, int], int] = {}
    for kind, couplings in structure.couplings.items():
        removed = {kind: {coupling.layer: _some(coupling) for coupling in couplings}}
        alone = replace(structure, couplings={kind: couplings})
        tried = next(
            (
                parts
                for parts in _orders(couplings)
                if _agree(run, config, model, _ordered(alone, parts), removed, tokens_BT)
            ),
            None,
        )
        if tried is None:
            raise ValueError(f"a look-alike without some of its {kind} doesn't compute what one with them masked does")
        order |= tried
    gone = {LAYERS: {0: [1]}}
    if not _agree(run, config, model, replace(structure, couplings={}), gone, tokens_BT):
        raise ValueError("a look-alike without a layer doesn't compute what one does whose layer adds nothing")
    return order


def _some(coupling: Coupling) -> list[int]:
    """Every layer loses as many units, but not the same ones."""
    count = coupling.units // 2
    return sorted((coupling.layer + 2 * index) % coupling.units for index in range(count))


def _orders(couplings: Sequence[Coupling]) -> Iterator[dict[tuple[str, int], int]]:
    """Ways in which units may lie in the members: in a row; as two or three matrices side by side."""
    yield {}
    members = {(_general(member.name), member.dim): member for member in couplings[0].members}
    fused = {key: [parts for parts in (2, 3) if member.each % parts == 0] for key, member in members.items()}
    for parts in (2, 3):
        for count in (1, 2):
            for keys in itertools.combinations([key for key, options in fused.items() if parts in options], count):
                yield dict.fromkeys(keys, parts)


def _ordered(structure: Structure, order: Mapping[tuple[str, int], int]) -> Structure:
    couplings = {
        kind: tuple(_with_parts(coupling, order) for coupling in of_kind)
        for kind, of_kind in structure.couplings.items()
    }
    return replace(structure, couplings=couplings)


@torch.no_grad()
def _agree(
    run: RunConfig, config: PreTrainedConfig, model: Any, structure: Structure, removed: Removed, tokens_BT: Tensor
) -> bool:
    """Whether the model with units masked computes what a model without them does."""
    cut = Cut(structure, removed)
    smaller: Any = build_model(run, cut.config(config), {}, 0).eval()
    whole = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in smaller.named_parameters():
        left = cut.apply(cut.origin(name), whole[cut.origin(name)])
        if left.shape != parameter.shape:
            return False
        parameter.copy_(left)
    masked = copy.deepcopy(model)
    mask_removed(Masks(masked, structure), structure, removed, 0.0)
    expected, found = (one(input_ids=tokens_BT).logits for one in (masked, smaller))
    return bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())))


def mask_removed(masks: Masks, structure: Structure, removed: Removed, value: float) -> None:
    """Give every unit in `removed` the value `value`, and 1 to the others."""
    for kind, couplings in structure.couplings.items():
        for coupling in couplings:
            gone = set(removed.get(kind, {}).get(coupling.layer, ()))
            masks.set(kind, coupling.layer, [value if unit in gone else 1.0 for unit in range(coupling.units)])
    gone = set(removed.get(LAYERS, {}).get(0, ()))
    for layer in range(structure.count):
        masks.set(LAYERS, layer, [value if layer in gone else 1.0])
