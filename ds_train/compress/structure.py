"""What of a model can be cut together, found from its config and its shapes, and proved on a small look-alike.

A stock config says how many heads, channels, experts and layers there are. Two outlines of the model whose configs
differ by one of them show which dimension of which parameter belongs to it; the order of units within a dimension is
tried until a look-alike with some units masked and one without them compute the same. What can't be proved isn't cut.
Shapes: B samples, T tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ds_train.compress.coupling import (
    EXPERTS,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    Coupling,
    Gate,
    Member,
    Removed,
    Structure,
)  # fmt: skip
from ds_train.compress.cut import Cut, heads_tie_hidden, resized, size_of
from ds_train.compress.gates import Gates
from ds_train.config import RunConfig
from ds_train.errors import UserError, first_line
from ds_train.models.fewer_layers import check_layers
from ds_train.models.load import build_model, outline, untrained
from ds_train.models.look_alike import small_run
from ds_train.models.tensor_plan import general_name, tensor_plan

_LAYERS, _SAMPLES, _LENGTH = 4, 2, 12
_TOLERANCE = 1e-5  # of the largest logit, fp32

_Shapes = dict[str, tuple[int, ...]]
_Order = dict[tuple[str, int], int]
"""Stretches of a kind of member, by its name without a layer's number and its dimension, where there are several."""


def find_structure(run: RunConfig, config: PreTrainedConfig, kinds: Iterable[str]) -> Structure:
    """What of the model can go, for each of `kinds`, proved on a look-alike.

    Raises:
        ValueError: the family's config can't say it, or the look-alike doesn't prove it.
    """
    kinds = tuple(kinds)
    try:
        found = _structure(run, config, kinds)
        small, small_config = small_run(run, config, layers=_LAYERS)
        order = _prove(small, small_config, _structure(small, small_config, kinds))
    except (ValueError, UserError):
        raise
    except Exception as error:  # a family's own code, which is built and run in sizes that nobody has tried
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"no model of other sizes can be built and compared ({reason})") from error
    return _ordered(found, order)


# -- finding ---------------------------------------------------------------------------------------------------------


def _structure(run: RunConfig, config: PreTrainedConfig, kinds: Sequence[str]) -> Structure:
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} holds a text model among others; train that by itself")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder and a decoder, whose layers have one config")
    whole = outline(run, config)
    others = untrained(whole)
    if others:
        raise ValueError(f"its {others[0]} isn't trained as others are, and would be lost")
    structure = Structure((), _layer_list(run, config, _shapes(whole)), size_of(config, LAYERS))
    if LAYERS in kinds:
        # What layers are by their places, from the start or from the end, shows where the first or the last has gone.
        for kept in (range(1, structure.count), range(structure.count - 1)):
            check_layers(whole, outline(run, resized(config, {}, kept)), kept)
    couplings: list[Coupling] = []
    for kind in kinds:
        couplings.extend(_of_kind(whole, structure, run, config, kind))
    return replace(structure, couplings=tuple(couplings))


def _of_kind(
    whole: PreTrainedModel, structure: Structure, run: RunConfig, config: PreTrainedConfig, kind: str
) -> Iterator[Coupling]:
    units = size_of(config, kind)
    if units < 2:
        raise ValueError(f"there is only one of its {kind}")
    if kind == LAYERS:
        gates = tuple(Gate(f"{structure.layers}.{layer}", "layer", unit=layer) for layer in range(units))
        yield Coupling(kind, 0, units, (), gates)
        return
    members: dict[int, list[Member]] = {}
    for member in _members(whole, run, config, kind, units):
        layer = structure.layer_of(member.name)
        if layer is None and kind != HIDDEN:
            raise ValueError(f"{member.name} outside of the layers has a share for each of its {kind}")
        members.setdefault(0 if kind == HIDDEN or layer is None else layer, []).append(member)
    if not members:
        raise ValueError(f"none of its parameters has a share for each of its {kind}")
    for number, own in sorted(members.items()):
        yield Coupling(kind, number, units, tuple(own), tuple(_gates(whole, structure, kind, own)))


def _members(
    whole: PreTrainedModel, run: RunConfig, config: PreTrainedConfig, kind: str, units: int
) -> Iterator[Member]:
    """The dimensions that have a share for each unit: they differ where the config has fewer."""
    tied = kind in (HEADS, HIDDEN) and heads_tie_hidden(config)
    sizes = {each: size_of(config, each) for each in (HEADS, HIDDEN)} if tied else {}
    fewer, left = _outline_of_fewer(run, config, sizes, HEADS if tied else kind)
    missing = units - (left * config.hidden_size // sizes[HEADS] if tied and kind == HIDDEN else left)
    inner = _inside_of_attention(whole) if tied else set()
    less_shapes = _shapes(fewer)
    for name, shape in _shapes(whole).items():
        for dim, (size, less) in enumerate(zip(shape, less_shapes[name], strict=True)):
            if size == less or (tied and ((general_name(name), dim) in inner) != (kind == HEADS)):
                continue
            each = (size - less) // missing
            if size != each * units or less != each * (units - missing):
                raise ValueError(f"{name} doesn't have the same share for each of its {kind}")
            yield Member(name, dim, each)


def _outline_of_fewer(
    run: RunConfig, config: PreTrainedConfig, sizes: Mapping[str, int], kind: str
) -> tuple[PreTrainedModel, int]:
    """The model with fewer units, and how many those are: one less, or as many as its config takes."""
    units = size_of(config, kind)
    refusal: ValueError | None = None
    for left in (units - 1, *(count for count in range(units - 2, 0, -1) if units % count == 0)):
        wanted = {kind: left}
        if kind == HEADS and heads_tie_hidden(config):
            wanted[HIDDEN] = left * sizes[HIDDEN] // units
        try:
            return outline(run, resized(config, wanted)), left
        except ValueError as error:
            refusal = refusal or error
    raise refusal or ValueError(f"there is only one of its {kind}")


def _inside_of_attention(model: PreTrainedModel) -> set[tuple[str, int]]:
    """Dimensions of parameters, by general name, that lie between matrices cut along outputs and along inputs."""
    inside: set[tuple[str, int]] = set()
    plan = tensor_plan(model)
    for name, module in model.named_modules():
        style = plan.get(general_name(name), "")
        out = 1 if isinstance(module, Conv1D) else 0
        general = general_name(name)
        if style in ("colwise", "fused_colwise"):
            inside |= {(f"{general}.weight", out), (f"{general}.bias", 0)}
        elif style == "rowwise":
            inside.add((f"{general}.weight", 1 - out))
    return inside


def _gates(whole: PreTrainedModel, structure: Structure, kind: str, members: Sequence[Member]) -> Iterator[Gate]:
    if kind == EXPERTS:
        if (getattr(whole.config, "n_group", None) or 1) > 1:
            # Those of a look-alike lie in one group.
            raise ValueError(f"its experts lie in {whole.config.n_group} groups, which would have other members")
        routers = [member for member in members if len(whole.get_parameter(member.name).shape) == 2]
        if len(routers) != 1 or not routers[0].name.endswith(".weight"):
            raise ValueError("the experts of a layer aren't chosen by one matrix")
        yield Gate(routers[0].name.removesuffix(".weight"), "router")
        return
    if kind == HIDDEN:
        yield from _gates_of_width(whole, structure, members)
        return
    readers = [member for member in members if _reads(whole, member)]
    if len(readers) != 1:
        mixture = kind == FFN and any(len(whole.get_parameter(member.name).shape) > 2 for member in members)
        what = "they are those of its experts, which can go themselves" if mixture else "there is no such one"
        raise ValueError(f"the {kind} of a layer aren't the input of one matrix: {what}")
    yield Gate(readers[0].name.removesuffix(".weight"), "input", readers[0].each, readers[0].dim)


def _gates_of_width(whole: PreTrainedModel, structure: Structure, members: Sequence[Member]) -> Iterator[Gate]:
    """Every norm, since what is behind it has no channel that is shut there, and what is read outside of the layers."""
    seen = set()
    for member in members:
        module = member.name.rpartition(".")[0]
        vector = len(whole.get_parameter(member.name).shape) == 1
        if vector and "norm" in type(whole.get_submodule(module)).__name__.lower():
            if module not in seen:
                yield Gate(module, "norm")
            seen.add(module)
        elif structure.layer_of(member.name) is None and _reads(whole, member):
            yield Gate(module, "input", dim=member.dim)


def _reads(model: PreTrainedModel, member: Member) -> bool:
    """Whether the member is the input of a matrix."""
    path, _, attribute = member.name.rpartition(".")
    module = model.get_submodule(path)
    if attribute != "weight":
        return False
    return (isinstance(module, nn.Linear) and member.dim == 1) or (isinstance(module, Conv1D) and member.dim == 0)


def _shapes(model: PreTrainedModel) -> _Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _layer_list(run: RunConfig, config: PreTrainedConfig, shapes: _Shapes) -> str:
    """Name of the list of layers: what has numbers that a model of one layer lacks."""
    if config.num_hidden_layers < 2:
        raise ValueError("a model of one layer has none to compare")
    of_one = _shapes(outline(run, resized(config, {}, range(1))))
    general = {general_name(name) for name in shapes.keys() - of_one.keys()}
    lists = {name.partition(".*.")[0] if ".*." in name else "" for name in general}
    if len(lists) != 1 or "" in lists:
        raise ValueError("its layers aren't one list")
    return lists.pop()


# -- proving ---------------------------------------------------------------------------------------------------------


def _prove(run: RunConfig, config: PreTrainedConfig, structure: Structure) -> _Order:
    """The order of units in each kind of member.

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
    tokens_BT = torch.randint(3, int(config.vocab_size), (_SAMPLES, _LENGTH), generator=draw)
    order: _Order = {}
    for kinds in _together(config, structure):
        couplings = tuple(coupling for coupling in structure.couplings if coupling.kind in kinds)
        alone = replace(structure, couplings=couplings)
        removed = _some(config, couplings)
        tried = next(
            (
                parts
                for parts in _orders(couplings)
                if _agree(run, config, model, _ordered(alone, parts), removed, tokens_BT)
            ),
            None,
        )
        if tried is None:
            what = " and ".join(kinds)
            raise ValueError(f"a look-alike without some of its {what} doesn't compute what one with them masked does")
        order |= tried
    return order


def _together(config: PreTrainedConfig, structure: Structure) -> list[tuple[str, ...]]:
    """Kinds that are proved one by one, or that the config can only change together."""
    kinds = list(dict.fromkeys(coupling.kind for coupling in structure.couplings))
    if {HEADS, HIDDEN} <= set(kinds) and heads_tie_hidden(config):
        return [(HEADS, HIDDEN), *((kind,) for kind in kinds if kind not in (HEADS, HIDDEN))]
    return [(kind,) for kind in kinds]


def _some(config: PreTrainedConfig, couplings: Sequence[Coupling]) -> Removed:
    """Every layer loses half of its units, but not the same ones; a model one layer."""
    removed: dict[str, dict[int, list[int]]] = {}
    for coupling in couplings:
        count = 1 if coupling.kind == LAYERS else coupling.units // 2
        units = sorted((coupling.number + 1 + 2 * index) % coupling.units for index in range(count))
        removed.setdefault(coupling.kind, {})[coupling.number] = units
    return removed


def _orders(couplings: Sequence[Coupling]) -> Iterator[_Order]:
    """Ways in which units may lie in the members: in a row; as two or three matrices side by side."""
    yield {}
    members = {(general_name(member.name), member.dim): member for coupling in couplings for member in coupling.members}
    for parts in (2, 3):
        able = [key for key, member in members.items() if member.each % parts == 0]
        for count in (1, 2):
            for keys in itertools.combinations(able, count):
                yield dict.fromkeys(keys, parts)


def _ordered(structure: Structure, order: _Order) -> Structure:
    def placed(member: Member) -> Member:
        return replace(member, parts=order.get((general_name(member.name), member.dim), 1))

    couplings = (
        replace(coupling, members=tuple(placed(member) for member in coupling.members))
        for coupling in structure.couplings
    )
    return replace(structure, couplings=tuple(couplings))


@torch.no_grad()
def _agree(
    run: RunConfig, config: PreTrainedConfig, model: Any, structure: Structure, removed: Removed, tokens_BT: Tensor
) -> bool:
    """Whether the model with units masked computes what a model without them does."""
    smaller: Any = cut_model(run, config, model, Cut(structure, removed)).eval()
    masked = copy.deepcopy(model)
    Gates(masked, structure).set_removed(structure, removed)
    expected, found = (one(input_ids=tokens_BT).logits for one in (masked, smaller))
    return bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())))


def check_shapes(run: RunConfig, config: PreTrainedConfig, cut: Cut) -> None:
    """Compare the sizes that a cut leaves with those of a model of its config.

    Raises:
        ValueError: a layer would be another one, or of another size, at the place that it comes to.
    """
    whole = _shapes(outline(run, config))
    for name, shape in _shapes(outline(run, cut.config(config))).items():
        left = cut.shape(cut.origin(name), whole.get(cut.origin(name), ()))
        if left != shape:
            raise ValueError(f"{name} would be left with the shape {left}, not {shape}")


@torch.no_grad()
def cut_model(run: RunConfig, config: PreTrainedConfig, model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """A model of the smaller config with what is left of the weights of `model`, a whole one."""
    smaller = build_model(run, cut.config(config), {}, 0)
    whole = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in smaller.named_parameters():
        left = cut.apply(cut.origin(name), whole[cut.origin(name)])
        if left.shape != parameter.shape:
            raise ValueError(f"{name} would be left with the shape {tuple(left.shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(left)
    return smaller
