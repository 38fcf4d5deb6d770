"""Pruning along a run: scores of units, the choice that all ranks make alike, masks, and the cut of a checkpoint.

Shapes: B samples, T tokens, C channels of a gate here (its tensor rank's), U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_train.compress.structure import (
    FFN,
    HEADS,
    LAYERS,
    Coupling,
    Cut,
    Masks,
    Removed,
    Structure,
    find_structure,
    resized,
    size_of,
)  # fmt: skip
from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.load import gathered
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import Shard, gather_whole
from ds_train.plan.topology import Layout
from ds_train.schedule.prune import PruneSteps, closed_share, unit_values
from ds_train.schedule.timeline import StepShape

Key = tuple[str, int]
"""(kind, layer)."""


class Prunable:
    """What a run's model can lose, and what its recipe asks to go. Found before anything large is built."""

    def __init__(self, run: RunConfig, config: PreTrainedConfig, layout: Layout) -> None:
        """
        Raises:
            UserError: the family can't be cut so, a layer would be left empty, or the ranks can't share what is left.
        """
        section = run.compress.prune
        try:
            self.structure = find_structure(run, config, section.kinds)
            self.counts = {kind: _count(section, config, kind) for kind in section.kinds}
            """Units of each layer that go, and layers."""
            self._check(section, config, layout)
        except ValueError as error:
            raise _refusal(section, config, first_line(error)) from error

    def cut(self, removed: Removed) -> Cut:
        """The model without the chosen units."""
        return Cut(self.structure, removed)

    def _check(self, section: PruneSection, config: PreTrainedConfig, layout: Layout) -> None:
        sizes = {kind: size_of(config, kind) - self.counts[kind] for kind in section.kinds}
        for kind, left in sizes.items():
            if left < 1:
                raise ValueError(f"none of its {kind} would be left")
        heads_over = layout.tensor * layout.sequence
        for kind, ranks in ((HEADS, heads_over), (FFN, layout.tensor), (LAYERS, layout.pipe)):
            left = sizes.get(kind, 0)
            if kind == LAYERS:
                if 0 < left < ranks:
                    raise ValueError(f"the {left} layers that stay are fewer than the {ranks} pipeline stages")
            elif left % ranks:
                raise ValueError(f"the {left} {kind} of a layer that stay can't be shared by {ranks} ranks")
        layers = range(sizes[LAYERS]) if LAYERS in sizes else None
        resized(config, {kind: left for kind, left in sizes.items() if kind != LAYERS}, layers)


class Pruning:
    """Pruning of one engine: hooks on this rank's part of the model, and what has been chosen."""

    def __init__(self, run: RunConfig, prunable: Prunable, part: Part) -> None:
        self._section, self._structure, self._part = run.compress.prune, prunable.structure, part
        self._counts = prunable.counts
        self.removed: dict[str, dict[int, list[int]]] | None = None
        """Units that go, the first to close first; None until they are chosen."""
        self._masks = Masks(part.model, prunable.structure, self._local)
        self._scores = _Scores(self._section, part.model, prunable.structure)

    def before_step(self, shape: StepShape, steps: PruneSteps, total_tokens: int) -> None:
        """Do what is due before a step: score, choose, or set the masks. Collective at the step of the choice."""
        if self.removed is None and shape.step >= steps.chosen:
            self.removed = self._choose()
        self._scores.collecting = self.removed is None and shape.step >= steps.scored
        if self.removed is not None:
            self._set_masks(closed_share(self._section, shape.before, total_tokens))

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold. Collective."""
        if self.removed is not None:
            return {"removed": self.removed}
        sums = self._gathered_sums()
        return {"scores": [[kind, layer, values.tolist()] for (kind, layer), values in sums.items()]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        if "removed" in state:
            self.removed = removed_of(state)
            return
        place = self._part.mesh.place
        for kind, layer, values in state.get("scores", ()):
            if place.data == place.sequence == 0:
                self._scores.put((kind, layer), torch.tensor(values, dtype=torch.float64), self._local)

    def _set_masks(self, closed: float) -> None:
        assert self.removed is not None
        for kind, couplings in self._structure.couplings.items():
            for coupling in couplings:
                order = self.removed.get(kind, {}).get(coupling.layer, [])
                self._masks.set(kind, coupling.layer, unit_values(order, coupling.units, closed))
        values = unit_values(self.removed.get(LAYERS, {}).get(0, []), self._structure.count, closed)
        for layer, value in enumerate(values):
            self._masks.set(LAYERS, layer, [value])

    def _choose(self) -> dict[str, dict[int, list[int]]]:
        """The units of least worth, the same on every rank: rank 0 chooses, by what all ranks have summed."""
        weights = self._weight_sums() if self._section.score in ("wanda", "magnitude") else {}
        sums = self._gathered_sums()
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            box[0] = self._least(sums, weights)
        dist.broadcast_object_list(box, src=0)
        self._scores.forget()
        chosen: dict[str, dict[int, list[int]]] = box[0]
        return chosen

    def _least(self, sums: dict[Key, Tensor], weights: dict[Key, Tensor]) -> dict[str, dict[int, list[int]]]:
        chosen: dict[str, dict[int, list[int]]] = {}
        for kind, count in self._counts.items():
            if kind == LAYERS:
                values = torch.cat([sums[LAYERS, layer] for layer in range(self._structure.count)])
                chosen[kind] = {0: _lowest(values, count)}
                continue
            chosen[kind] = {}
            for coupling in self._structure.couplings[kind]:
                key = (kind, coupling.layer)
                values = _worth(self._section.score, coupling, sums.get(key), weights.get(key))
                chosen[kind][coupling.layer] = _lowest(values, count)
        return chosen

    def _local(self, module: nn.Module, values_C: Tensor) -> Tensor:
        """This rank's channels of a gate's module."""
        shard: Shard | None = getattr(module.weight, "tensor_shard", None)
        if shard is None:
            return values_C
        return Shard(0).cut(values_C, self._part.mesh.place.tensor, self._part.mesh.layout.tensor)

    def _gathered_sums(self) -> dict[Key, Tensor]:
        """Sums over all ranks, of all channels. Collective; on every rank."""
        place, modules = self._part.mesh.place, dict(self._part.model.named_modules())
        own: dict[Key, tuple[int, Tensor]] = {}
        for key, values in self._scores.sums.items():
            name = self._scores.names[key]
            sharded = key[0] != LAYERS and hasattr(modules[name].weight, "tensor_shard")
            if sharded or place.tensor == 0:
                own[key] = (place.tensor if sharded else 0, values)
        everyones: list[dict[Key, tuple[int, Tensor]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, own)
        shards: dict[Key, dict[int, Tensor]] = {}
        for ranks in everyones:
            for key, (shard, values) in ranks.items():
                of_key = shards.setdefault(key, {})
                of_key[shard] = of_key[shard] + values if shard in of_key else values
        return {key: torch.cat([of_key[shard] for shard in sorted(of_key)]) for key, of_key in sorted(shards.items())}

    def _weight_sums(self) -> dict[Key, Tensor]:
        """Of each gate's channels the sum of the absolute weights that read them, or of each unit the sum of all its
        weights' squares. Collective; on every rank."""
        parameters = dict(self._part.model.named_parameters())
        own: dict[Key, Tensor] = {}
        for kind, couplings in self._structure.couplings.items():
            for coupling in couplings:
                if coupling.gate.name not in parameters:
                    continue  # another stage's
                members = (coupling.gate,) if self._section.score == "wanda" else coupling.members
                for member in members:
                    with gathered([parameters[member.name]]):
                        whole = gather_whole(parameters[member.name], self._part.mesh.tensor).double()
                    others = [dim for dim in range(whole.dim()) if dim != member.dim]
                    if self._section.score == "wanda":
                        own[kind, coupling.layer] = (whole.abs().sum(others) if others else whole.abs()).cpu()
                        continue
                    squares = (whole.square().sum(others) if others else whole.square()).cpu()
                    places = member.indices(range(coupling.units), coupling.units)
                    parts = squares[places].view(member.parts, coupling.units, -1).sum((0, 2))
                    key = (kind, coupling.layer)
                    own[key] = own[key] + parts if key in own else parts
        everyones: list[dict[Key, Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, own)
        return {key: values for ranks in reversed(everyones) for key, values in ranks.items()}


class CutSource:
    """What a checkpoint of the whole model holds of the smaller one (a `Source` of checkpoint/fragments.py)."""

    def __init__(self, cut: Cut, whole: Callable[[str, str], Tensor]) -> None:
        """`whole(name, kind)` gives a parameter of the whole model, or a state of it."""
        self._cut, self._whole = cut, whole

    def read(self, name: str, kind: str, shape: Any, shard: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` - 1 of a shard, flattened."""
        left = self.whole(name, kind)
        if tuple(left.shape) != shape.whole:
            raise ValueError(f"{name} is left with the shape {tuple(left.shape)} and has {shape.whole} here")
        return (left if shape.cut is None else shape.cut.cut(left, shard, shape.shards)).reshape(-1)[start:stop]

    def whole(self, name: str, kind: str) -> Tensor:
        """A whole parameter of the smaller model, or a state of it."""
        origin = self._cut.origin(name)
        return self._cut.apply(origin, self._whole(origin, kind))


def removed_of(state: Mapping[str, Any]) -> dict[str, dict[int, list[int]]]:
    """The chosen units in what a checkpoint holds; JSON has turned numbers of layers into words."""
    return {kind: {int(layer): list(units) for layer, units in of.items()} for kind, of in state["removed"].items()}


class _Scores:
    """Sums over tokens of what the gates' inputs and the layers do, while `collecting`.

    A token that the loss doesn't depend on (padding) has no gradient and doesn't count.
    """

    def __init__(self, section: PruneSection, model: nn.Module, structure: Structure) -> None:
        self.collecting = False
        self.sums: dict[Key, Tensor] = {}
        """fp64, of the channels that are here (of units for `fisher`); of a layer one number."""
        self.names: dict[Key, str] = {}
        self._score = section.score
        modules = dict(model.named_modules())
        for couplings in structure.couplings.values():
            for coupling in couplings:
                module = modules.get(coupling.module)
                if module is not None and section.score != "magnitude":
                    self.names[coupling.kind, coupling.layer] = coupling.module
                    module.register_forward_pre_hook(self._watch_input(coupling))
        for layer in range(structure.count if section.layers else 0):
            module = modules.get(f"{structure.layers}.{layer}")
            if module is not None and any(True for _ in module.parameters()):
                self.names[LAYERS, layer] = f"{structure.layers}.{layer}"
                module.register_forward_hook(self._watch_change((LAYERS, layer)), with_kwargs=True)
        self._modules = modules

    def forget(self) -> None:
        """Start again from nothing."""
        self.sums.clear()

    def put(self, key: Key, values: Tensor, local: Callable[[nn.Module, Tensor], Tensor]) -> None:
        """Start from sums over all ranks, on the rank that speaks for its layer's shard."""
        if key in self.names:
            self.sums[key] = values if key[0] == LAYERS else local(self._modules[self.names[key]], values)

    def _add(self, key: Key, values: Tensor) -> None:
        values = values.double().cpu()
        self.sums[key] = self.sums[key] + values if key in self.sums else values

    def _watch_input(self, coupling: Coupling) -> Callable[..., None]:
        key = (coupling.kind, coupling.layer)

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            given: Tensor = inputs[0]
            if not (self.collecting and given.requires_grad):
                return
            kept = given.detach()

            def count(gradient: Tensor) -> None:
                flat_NC, slope_NC = kept.flatten(0, -2).float(), gradient.detach().flatten(0, -2).float()
                if self._score == "taylor":
                    self._add(key, (flat_NC * slope_NC).sum(0))
                elif self._score == "fisher":
                    product_NU = (flat_NC * slope_NC).unflatten(-1, (-1, coupling.gate.each)).sum(-1)
                    self._add(key, product_NU.square().sum(0))
                else:
                    alive_N1 = (slope_NC != 0).any(-1, keepdim=True)
                    self._add(key, (flat_NC.square() * alive_N1).sum(0))

            given.register_hook(count)

        return hook

    def _watch_change(self, key: Key) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            if not (self.collecting and after.requires_grad):
                return
            before, kept = (inputs[0] if inputs else options["hidden_states"]).detach(), after.detach()

            def count(gradient: Tensor) -> None:
                alive_BT = (gradient != 0).any(-1)
                change_BT = 1.0 - torch.nn.functional.cosine_similarity(before.float(), kept.float(), dim=-1)
                self._add(key, (change_BT * alive_BT).sum().view(1))

            after.register_hook(count)

        return hook


def _worth(score: str, coupling: Coupling, sums: Tensor | None, weights: Tensor | None) -> Tensor:
    """What each unit of a layer is worth: (U,) fp64."""
    each = coupling.gate.each
    if score == "magnitude":
        assert weights is not None
        return weights
    assert sums is not None
    if score == "fisher":
        return sums
    if score == "taylor":
        return sums.view(-1, each).sum(-1).abs()
    if score == "activation":
        return sums.view(-1, each).sum(-1).sqrt()
    assert weights is not None
    return (sums.sqrt() * weights).view(-1, each).sum(-1)


def _lowest(values: Tensor, count: int) -> list[int]:
    """Places of the `count` lowest values, the lowest first, of equal ones the first first."""
    return sorted(range(len(values)), key=lambda place: (float(values[place]), place))[:count]


def _count(section: PruneSection, config: PreTrainedConfig, kind: str) -> int:
    if kind == LAYERS:
        return section.layers
    units = size_of(config, kind)
    left = (1.0 - getattr(section, kind)) * units
    if kind == HEADS:
        return units - math.ceil(left - 1e-9)
    return units - min(units, math.ceil(left / section.multiple - 1e-9) * section.multiple)


def _refusal(section: PruneSection, config: PreTrainedConfig, reason: str) -> UserError:
    kind = section.kinds[0]
    fixes = {HEADS: "prune ffn or layers instead", FFN: "prune layers instead", LAYERS: "prune ffn instead"}
    named = next((kind for kind in section.kinds if kind in reason), kind)
    return user_error(
        f"compress.prune.{named}", f"{config.model_type} can't lose these: {reason}", fixes[named],
        getattr(section, named),
    )  # fmt: skip
