"""Pruning of one engine in any layout: scores summed over all ranks, one choice, masks, and the cut.

Shapes: C channels of a gate, U units.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_train.compress.coupling import HEADS, HIDDEN, LAYERS, OF_MODEL, Coupling, Gate, Structure
from ds_train.compress.cut import Cut, heads_tie_hidden, resized, size_of
from ds_train.compress.gates import Gates, Key, lowest, worth
from ds_train.compress.structure import find_structure
from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.engine.ranks import all_sum
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.load import gathered, outline
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import Shard, gather_whole
from ds_train.plan.prune import problems, units_left
from ds_train.plan.topology import Layout
from ds_train.schedule.prune import PruneSteps, closed_share, prune_steps, unit_values
from ds_train.schedule.timeline import StepShape, Timeline

_HALVINGS = 40


@dataclass(frozen=True)
class Prunable:
    """What of a model goes: its structure, proved, and how many units of each coupling of a kind stay."""

    config: PreTrainedConfig
    structure: Structure
    left: dict[str, int]


def find_prunable(run: RunConfig, config: PreTrainedConfig, after: Layout) -> Prunable:
    """What the recipe asks to go of a model of this config. `after` is the layout from the cut on.

    Raises:
        UserError: the family can't be cut so, a layer would be left empty, or the ranks can't share what is left.
    """
    section = run.compress.prune
    try:
        sizes = {kind: size_of(config, kind) for kind in section.kinds}
        left = _left(section, config, sizes)
        _check(section, sizes, left, after)
        structure = find_structure(run, config, section.kinds)
        if section.parameters is not None:
            left = _left_for(run, config, structure, sizes)
            _check(section, sizes, left, after)
        resized(config, _widths(left))
    except ValueError as error:
        raise _refusal(section, config, first_line(error)) from error
    return Prunable(config, structure, left)


def steps_of(run: RunConfig, timeline: Timeline) -> PruneSteps:
    """The steps of a recipe that prunes.

    Raises:
        UserError: there are too few.
    """
    try:
        return prune_steps(run.compress.prune, timeline)
    except ValueError as error:
        raise user_error("schedule", f"{first_line(error)}: none is left after the cut", "train longer") from error


def parameters_of(part: Part) -> int:
    """Parameters of the whole model."""
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in part.outline.parameters())
    return sum(torch.Size(shape).numel() for shape in shapes)


class Pruning:
    """Pruning of one engine, from its first score to the choice of what is cut."""

    def __init__(self, run: RunConfig, prunable: Prunable, engine: Any, part: Part, steps: PruneSteps) -> None:
        self._section, self._engine, self._part = run.compress.prune, engine, part
        self.prunable, self.steps = prunable, steps
        self.removed: dict[str, dict[int, list[int]]] | None = None
        """Units that go, the first to close first; None until they are chosen."""
        self._scored = 0
        self._gates = Gates(part.model, prunable.structure, self._section.score, self._local)

    def before_step(self, shape: StepShape, timeline: Timeline) -> None:
        """Do what is due before a step: score, choose, or set the masks. Collective at the step of the choice."""
        if self.removed is None and shape.step >= self.steps.chosen:
            self.choose()
        self._gates.collecting = self.removed is None and shape.step >= self.steps.scored
        if self._gates.collecting:
            self._scored += 1
            layout = self._part.mesh.layout
            scale = getattr(self._engine.optimizer, "loss_scale", 1.0)
            self._gates.gradient_scale = float(scale) * layout.data * layout.sequence
        if self.removed is not None:
            self.set_masks(closed_share(self._section, shape.before, timeline.total_tokens))

    def choose(self) -> None:
        """Choose the units of least worth: rank 0 does, by what all ranks have summed, and tells. Collective.

        Raises:
            UserError: no step has been scored.
        """
        if not self._scored:
            reason = "no step before it has been scored"
            raise user_error("compress.prune.start", reason, "start later", self._section.start)
        weights, sums = self._weight_norms(), self._all_sums()
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            box[0] = self._least(sums, weights)
        dist.broadcast_object_list(box, src=0)
        self.removed = box[0]
        self._gates.sums.clear()
        self._gates.collecting = False

    def set_masks(self, closed: float) -> None:
        """Close the share `closed` of the chosen units."""
        for coupling in self.prunable.structure.couplings:
            order = (self.removed or {}).get(coupling.kind, {}).get(coupling.number, [])
            self._gates.set(coupling.kind, coupling.number, unit_values(order, coupling.units, closed))

    def cut(self) -> Cut:
        """The model without the chosen units."""
        assert self.removed is not None
        return Cut(self.prunable.structure, self.removed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as plain values. Collective."""
        if self.removed is not None:
            return {"removed": self.removed}
        if not self._scored:
            return {}
        sums = [[*key, values.tolist()] for key, values in self._all_sums().items()]
        return {"scored": self._scored, "sums": sums}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        if "removed" in state:
            # JSON has turned the numbers of couplings into words.
            removed = state["removed"].items()
            self.removed = {kind: {int(number): units for number, units in of.items()} for kind, of in removed}
        self._scored = state.get("scored", 0)
        place, here = self._part.mesh.place, self._gates.here()
        for kind, number, module, values in state.get("sums", ()):
            own = here.get((kind, number, module))
            if own is not None and place.data == place.sequence == 0:
                whole = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
                self._gates.sums[kind, number, module] = self._local(*own, whole)

    def _least(
        self, sums: dict[Key, Tensor], weights: dict[tuple[str, int], Tensor]
    ) -> dict[str, dict[int, list[int]]]:
        removed: dict[str, dict[int, list[int]]] = {}
        for coupling in self.prunable.structure.couplings:
            values = worth(coupling, self._section.score, sums, weights.get((coupling.kind, coupling.number)))
            count = coupling.units - self.prunable.left[coupling.kind]
            removed.setdefault(coupling.kind, {})[coupling.number] = lowest(values, count)
        return removed

    def _local(self, gate: Gate, module: nn.Module, values_C: Tensor) -> Tensor:
        """Of all channels of a gate those of this tensor rank."""
        if not _is_sharded(gate, module):
            return values_C
        return Shard(0).cut(values_C, self._part.mesh.place.tensor, self._part.mesh.layout.tensor)

    def _all_sums(self) -> dict[Key, Tensor]:
        """Sums over all ranks, of all channels, on the host. Collective."""
        sizes = {
            (coupling.kind, coupling.number, gate.module): _measured(self._section.score, coupling, gate)
            for coupling in self.prunable.structure.couplings
            for gate in coupling.gates
        }
        place, tensor_ranks, here = self._part.mesh.place, self._part.mesh.layout.tensor, self._gates.here()
        flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=self._engine.device)
        runs = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for key, values in self._gates.sums.items():
            if _is_sharded(*here[key]):
                runs[key].chunk(tensor_ranks)[place.tensor].add_(values)
            elif place.tensor == 0:
                runs[key].add_(values)
        return dict(zip(sizes, all_sum(flat).cpu().split(list(sizes.values())), strict=True))

    def _weight_norms(self) -> dict[tuple[str, int], Tensor]:
        """Of each unit the norm of its weights that the score looks at, (U,) fp64 on the host. Collective."""
        if self._section.score not in ("wanda", "magnitude"):
            return {}
        couplings = [coupling for coupling in self.prunable.structure.couplings if coupling.kind != LAYERS]
        sizes = [coupling.units for coupling in couplings]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self._engine.device)
        parameters, mesh = dict(self._part.model.named_parameters()), self._part.mesh
        counts = mesh.place.data == mesh.place.sequence == mesh.place.tensor == 0
        for coupling, squares_U in zip(couplings, flat.split(sizes), strict=True):
            for member in _weighed(coupling, self._section.score):
                parameter = parameters.get(member.name)
                if parameter is None:
                    continue  # another stage's
                with gathered([parameter]):
                    whole = gather_whole(parameter, mesh.tensor).double()
                if counts and not getattr(parameter, "ds_pipe_replicated", False):
                    others = [dim for dim in range(whole.dim()) if dim != member.dim]
                    of_places = whole.square().sum(others) if others else whole.square()
                    places = member.indices(range(coupling.units), coupling.units).to(of_places.device)
                    squares_U += of_places[places].view(member.parts, coupling.units, -1).sum((0, 2))
        norms = all_sum(flat).cpu().sqrt().split(sizes)
        return {(coupling.kind, coupling.number): norm for coupling, norm in zip(couplings, norms, strict=True)}


def _is_sharded(gate: Gate, module: nn.Module) -> bool:
    shard: Shard | None = getattr(module.weight, "tensor_shard", None) if gate.how == "input" else None
    return shard is not None and shard.dim == gate.dim


def _measured(score: str, coupling: Coupling, gate: Gate) -> int:
    """How many numbers a gate measures."""
    if coupling.kind == LAYERS:
        return 1
    return coupling.units if gate.how == "router" or score == "fisher" else coupling.units * gate.each


def _weighed(coupling: Coupling, score: str) -> Iterator[Any]:
    """`magnitude` looks at all weights of a unit; `wanda` at those that read it, where it is the input of a matrix."""
    readers = {f"{gate.module}.weight" for gate in coupling.gates if gate.how == "input"}
    for member in coupling.members:
        if score == "magnitude" or coupling.kind in OF_MODEL or not readers or member.name in readers:
            yield member


def _widths(left: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in left.items() if kind != LAYERS}


def _check(section: PruneSection, sizes: Mapping[str, int], left: Mapping[str, int], after: Layout) -> None:
    found = list(problems(section, sizes, left, after))
    if found:
        raise UserError(found)


def _left(
    section: PruneSection, config: PreTrainedConfig, sizes: Mapping[str, int], scale: float | None = None
) -> dict[str, int]:
    """`units_left`, with the next larger numbers of heads and hidden size that the family's config takes.

    All of a kind stay only if shares are scaled; otherwise the config is left to say why it takes no fewer.
    """
    more_than_all = 0 if scale is None else 1
    scale = 1.0 if scale is None else scale
    left = units_left(section, sizes, heads_tie_hidden(config), scale)
    choices: dict[str, list[int | None]] = {kind: [left.get(kind)] for kind in (HEADS, HIDDEN)}
    if not (heads_tie_hidden(config) and HEADS in left and HIDDEN in left):
        # Its hidden size may have to be a multiple of the number of heads.
        choices |= {kind: [*range(left[kind], sizes[kind] + more_than_all)] for kind in choices if kind in left}
    for more, wider in itertools.product(choices[HEADS], choices[HIDDEN]):
        tried = left | {kind: count for kind, count in ((HEADS, more), (HIDDEN, wider)) if count is not None}
        try:
            resized(config, _widths(tried))
        except ValueError:
            continue
        return tried
    return left


def _left_for(
    run: RunConfig, config: PreTrainedConfig, structure: Structure, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Units that stay so that the model has at most as many parameters as the recipe says: the shares are scaled."""
    section = run.compress.prune
    assert section.parameters is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in outline(run, config).named_parameters()}

    def parameters(scale: float) -> int:
        left = _left(section, config, sizes, scale)
        removed: dict[str, dict[int, range]] = {}
        for coupling in structure.couplings:
            removed.setdefault(coupling.kind, {})[coupling.number] = range(left[coupling.kind], coupling.units)
        return Cut(structure, removed).parameters(shapes)

    largest = max(getattr(section, kind) for kind in section.kinds if kind != LAYERS)
    low, high = 0.0, (1.0 - 1e-6) / largest
    if parameters(high) > section.parameters:
        raise ValueError(f"with all but the last of these gone it would have {parameters(high):,} parameters")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(middle) <= section.parameters else (middle, high)
    return _left(section, config, sizes, high)


def _refusal(section: PruneSection, config: PreTrainedConfig, reason: str) -> UserError:
    """The refusal of what the recipe asks for by a model."""
    kinds = section.kinds
    others = [kind for kind in ("ffn", "layers") if kind not in kinds]
    fix = f"prune {' or '.join(others)}" if others else "prune one kind of unit"
    named = next((kind for kind in kinds if f"its {kind}" in reason), kinds[0])
    value = getattr(section, named)
    return user_error(f"compress.prune.{named}", f"{config.model_type} can't lose these: {reason}", fix, value)
