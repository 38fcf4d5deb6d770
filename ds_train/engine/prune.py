"""Pruning of one engine in any layout: scores summed over all ranks, one choice, masks, and the cut.

Shapes: C channels of a gate, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_train.compress.budget import compete, relative
from ds_train.compress.coupling import FFN, LAYERS, OF_MODEL, Coupling, Gate
from ds_train.compress.cut import Cut
from ds_train.compress.gates import Gates, Key, lowest, worth
from ds_train.compress.learned import LearnedGates, Shared, open_probability, units_of
from ds_train.config import RunConfig
from ds_train.engine.prunable import Prunable
from ds_train.engine.ranks import all_sum
from ds_train.errors import first_line, user_error
from ds_train.models.load import gathered
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import Shard, gather_whole
from ds_train.plan.prune import of_layer
from ds_train.schedule.prune import PruneSteps, closed_share, prune_steps, unit_values
from ds_train.schedule.timeline import StepShape, Timeline


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
        self._learned = _learned(run, prunable, steps) if self._section.score == "gates" else None
        self._drawn: int | None = None  # the step whose gates haven't been learned from yet

    def before_step(self, shape: StepShape, timeline: Timeline) -> None:
        """Do what is due before a step: score, choose, or set the masks. Collective."""
        self._learn()
        if self.removed is None and shape.step >= self.steps.chosen:
            self.choose()
        self._gates.collecting = self.removed is None and shape.step >= self.steps.scored
        if self._gates.collecting:
            self._scored += 1
            layout = self._part.mesh.layout
            scale = getattr(self._engine.optimizer, "loss_scale", 1.0)
            self._gates.gradient_scale = float(scale) * layout.data * layout.sequence
            if self._learned is not None:
                self._drawn = shape.step
                for place, values in self._learned.draw(shape.step).items():
                    self._gates.learn(*place, values)
        if self.removed is not None:
            self.set_masks(closed_share(self._section, shape.before, timeline.total_tokens))

    def forget_step(self) -> None:
        """The step that `before_step` has prepared isn't trained."""
        if self._gates.collecting:
            self._scored -= 1
        self._drawn = None

    def choose(self) -> None:
        """Choose the units of least worth: rank 0 does, by what all ranks have summed, and tells. Collective.

        Raises:
            UserError: no step has been scored.
        """
        if not self._scored:
            reason = "no step before it has been scored"
            raise user_error("compress.prune.start", reason, "start later", self._section.start)
        self._learn()
        weights, sums = self._weight_norms(), self._all_sums(self._gates.sums)
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
        chosen = {"left": dict(self.prunable.left)} if self._section.targets else {}
        if self.removed is not None:
            return chosen | {"removed": self.removed}
        if not self._scored:
            return chosen
        self._learn()
        all_sums = self._all_sums(self._gates.sums)
        if self._learned is None:
            return chosen | {"scored": self._scored, "sums": [[*key, sums.tolist()] for key, sums in all_sums.items()]}
        of_layers = [[*key, sums.tolist()] for key, sums in all_sums.items() if key[0] == LAYERS]
        return chosen | {"scored": self._scored, "sums": of_layers, "gates": self._learned.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        if "removed" in state:
            # JSON has turned the numbers of couplings into words.
            removed = state["removed"].items()
            self.removed = {kind: {int(number): units for number, units in of.items()} for kind, of in removed}
        self._scored = state.get("scored", 0)
        if self._learned is not None and "gates" in state:
            self._learned.load_state(state["gates"])
        place, here = self._part.mesh.place, self._gates.here()
        for kind, number, module, values in state.get("sums", ()):
            own = here.get((kind, number, module))
            if own is not None and place.data == place.sequence == 0:
                whole = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
                self._gates.sums[kind, number, module] = self._local(*own, whole)

    def _learn(self) -> None:
        """Go on with the gates that are learned by the gradients of the last step, if they haven't. Collective."""
        if self._learned is None or self._drawn is None:
            return
        gradients = self._all_sums(self._gates.take_gradients())
        by_unit = {
            (coupling.kind, coupling.number): units_of(
                (gradients[coupling.kind, coupling.number, gate.module] for gate in coupling.gates), coupling.units
            )
            for coupling in self.prunable.structure.couplings
            if coupling.kind != LAYERS
        }
        self._learned.learn(self._drawn, by_unit)
        self._drawn = None

    def _least(
        self, sums: dict[Key, Tensor], weights: dict[tuple[str, int], Tensor]
    ) -> dict[str, dict[int, list[int]]]:
        """The units that go, by what all of them are worth."""
        worths = {
            (coupling.kind, coupling.number): self._worth(coupling, sums, weights)
            for coupling in self.prunable.structure.couplings
        }
        removed: dict[str, dict[int, list[int]]] = {}
        for coupling in self.prunable.structure.couplings:
            count = coupling.units - of_layer(self.prunable.left[coupling.kind], coupling.number)
            values = worths[coupling.kind, coupling.number]
            removed.setdefault(coupling.kind, {})[coupling.number] = lowest(values, count)
        if self._section.budget == "global" and FFN in removed:
            gone = removed.get(LAYERS, {}).get(0, [])
            stay = {layer: worths[FFN, layer] for layer in removed[FFN] if layer not in gone}
            asked = sum(len(removed[FFN][layer]) for layer in stay)
            removed[FFN] |= compete(stay if self._learned else relative(stay), asked, self.prunable.step)
        return removed

    def _worth(self, coupling: Coupling, sums: dict[Key, Tensor], weights: dict[tuple[str, int], Tensor]) -> Tensor:
        """What each unit is worth: (U,) fp64."""
        place = coupling.kind, coupling.number
        if self._learned is not None and place in self._learned.log_alpha:
            return open_probability(self._learned.log_alpha[place])
        return worth(coupling, self._section.score, sums, weights.get(place))

    def _local(self, gate: Gate, module: nn.Module, values_C: Tensor) -> Tensor:
        """Of all channels of a gate those of this tensor rank."""
        if not _is_sharded(gate, module):
            return values_C
        return Shard(0).cut(values_C, self._part.mesh.place.tensor, self._part.mesh.layout.tensor)

    def _all_sums(self, own: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Sums over all ranks of what each has of its channels: of all channels, on the host. Collective."""
        sizes = {
            (coupling.kind, coupling.number, gate.module): _measured(self._section.score, coupling, gate)
            for coupling in self.prunable.structure.couplings
            for gate in coupling.gates
        }
        place, tensor_ranks, here = self._part.mesh.place, self._part.mesh.layout.tensor, self._gates.here()
        flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=self._engine.device)
        runs = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for key, values in own.items():
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
                    whole = gather_whole(parameter, mesh.tensor)
                    if not counts or getattr(parameter, "ds_pipe_replicated", False):
                        continue
                    # Summed in fp64, of which no matrix is made: an embedding's would be gigabytes.
                    squares = whole.float().square()
                others = [dim for dim in range(squares.dim()) if dim != member.dim]
                of_places = squares.sum(others, dtype=torch.float64) if others else squares.double()
                places = member.indices(range(coupling.units), coupling.units).to(of_places.device)
                squares_U += of_places[places].view(member.parts, coupling.units, -1).sum((0, 2))
        norms = all_sum(flat).cpu().sqrt().split(sizes)
        return {(coupling.kind, coupling.number): norm for coupling, norm in zip(couplings, norms, strict=True)}


def _learned(run: RunConfig, prunable: Prunable, steps: PruneSteps) -> LearnedGates:
    """The gates of all units but layers."""
    shared: list[Shared] = []
    together: dict[tuple[str, int], int] = {}
    for coupling in prunable.structure.couplings:
        place, left = (coupling.kind, coupling.number), prunable.left[coupling.kind]
        if coupling.kind == FFN and run.compress.prune.budget == "global":
            together[place] = coupling.units
        elif coupling.kind != LAYERS:
            shared.append(Shared({place: coupling.units}, of_layer(left, coupling.number)))
    if together:
        shared.append(Shared(together, sum(of_layer(prunable.left[FFN], layer) for _, layer in together)))
    return LearnedGates(shared, steps.chosen - steps.scored, run.seed)


def _is_sharded(gate: Gate, module: nn.Module) -> bool:
    shard: Shard | None = getattr(module.weight, "tensor_shard", None) if gate.how == "input" else None
    return shard is not None and shard.dim == gate.dim


def _measured(score: str, coupling: Coupling, gate: Gate) -> int:
    """How many numbers a gate measures."""
    if coupling.kind == LAYERS:
        return 2
    return coupling.units if gate.how == "router" or score == "fisher" else coupling.units * gate.each


def _weighed(coupling: Coupling, score: str) -> Iterator[Any]:
    """`magnitude` looks at all weights of a unit; `wanda` at those that read it, where it is the input of a matrix."""
    readers = {f"{gate.module}.weight" for gate in coupling.gates if gate.how == "input"}
    for member in coupling.members:
        if score == "magnitude" or coupling.kind in OF_MODEL or not readers or member.name in readers:
            yield member
