"""What an engine of DeepSpeed holds of a model, as named runs of elements: the same names in every layout.

A parameter of the whole model is cut by tensor ranks (its `Shard`), and each shard, flattened, is spread over data
ranks by ZeRO. A `Fragment` is one rank's run of one shard, with the fp32 weight and the optimizer's states of the same
elements. From all ranks' fragments the whole tensors follow, and from those any other layout's fragments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_train.models.load import first_names
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import Shard

WEIGHT = "weight"


@dataclass(frozen=True)
class Shape:
    """Whole size of a parameter, and how it is cut in `shards` pieces; `cut` is None where there is one."""

    whole: tuple[int, ...]
    cut: Shard | None
    shards: int

    def of_shard(self) -> tuple[int, ...]:
        """Size of one shard."""
        if self.cut is None:
            return self.whole
        sizes = list(self.whole)
        sizes[self.cut.dim] //= self.shards
        return tuple(sizes)


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and following of shard number `shard`, flattened.

    `tensors` are views of the engine's own memory, 1-D and of one length: `weight` in fp32 (or whatever the engine
    updates), and each state of the optimizer under its name.
    """

    name: str
    shape: Shape
    shard: int
    start: int
    tensors: dict[str, Tensor]

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.tensors[WEIGHT].numel()


class Source(Protocol):
    """Where whole parameters come from: a checkpoint, or one seen through a change of the model."""

    def read(self, name: str, kind: str, shape: Shape, shard: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` - 1 of a shard, flattened: (stop - start,)."""


@dataclass(frozen=True)
class _Place:
    """Where the engine updates elements of a parameter: `numel` from `offset` of the flat `master`, which are
    `start` and following of the parameter."""

    parameter: nn.Parameter
    master: Tensor
    offset: int
    start: int
    numel: int


def fragments(engine: Any, part: Part) -> Iterator[list[Fragment]]:
    """This rank's fragments, a batch that lies in memory at a time. A weight of two stages is the first one's alone.

    Of ranks that hold the same elements each gives a share, or one of them all.
    """
    yield from _walk(engine, part, everything=False)


def scalars(engine: Any) -> dict[str, Any]:
    """What the engine knows besides tensors, the same on every rank: the optimizer's step, the loss scale."""
    base = _base_optimizer(engine)
    steps = [state["step"] for state in base.state.values() if "step" in state]
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "optimizer_step": int(steps[0]) if steps else None,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": _moving_parts(scaler) if getattr(scaler, "dynamic", False) else {},
    }


def fill(engine: Any, part: Part, source: Source, kinds: dict[str, torch.dtype], known: dict[str, Any]) -> None:
    """Give the engine the weights and states of `source`. Collective.

    Args:
        kinds: what there is of each parameter besides its weight, by the optimizer's names, with the number formats.
        known: what `scalars` gave.
    """
    base = _base_optimizer(engine)
    with torch.no_grad():
        for batch in _walk(
            engine, part, everything=True, before=lambda master: _make_states(base, master, kinds, known)
        ):
            for fragment in batch:
                for kind, tensor in fragment.tensors.items():
                    where = (fragment.name, kind, fragment.shape, fragment.shard, fragment.start, fragment.stop)
                    tensor.copy_(source.read(*where))
        _publish(engine)
    engine.skipped_steps = known["skipped_steps"]
    for key, value in known["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, key, value)


def _walk(
    engine: Any, part: Part, everything: bool, before: Callable[[Tensor], None] = lambda _: None
) -> Iterator[list[Fragment]]:
    whole = dict(part.outline.named_parameters(remove_duplicate=False))
    first = first_names(part.outline)
    names = {id(parameter): first[name] for name, parameter in part.model.named_parameters()}
    base, place, tensor_ranks = _base_optimizer(engine), part.mesh.place, part.mesh.layout.tensor
    for places in _places(engine, part, everything):
        batch = []
        for spot in places:
            name, cut = names[id(spot.parameter)], getattr(spot.parameter, "tensor_shard", None)
            twice = getattr(spot.parameter, "ds_pipe_replicated", False) or (cut is None and place.tensor > 0)
            if (twice and not everything) or spot.numel <= 0:
                continue
            before(spot.master)
            size = getattr(whole[name], "ds_shape", whole[name].shape)
            shape = Shape(tuple(size), cut, tensor_ranks if cut is not None else 1)
            tensors = {
                kind: value.view(-1).narrow(0, spot.offset, spot.numel)
                for kind, value in _states(base, spot.master).items()
            }
            shard = place.tensor if cut is not None else 0
            batch.append(Fragment(name, shape, shard, spot.start, tensors))
        yield batch


def _states(base: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    states = base.state.get(master, {}).items()
    kept = {kind: value for kind, value in states if torch.is_tensor(value) and value.shape == master.shape}
    return {WEIGHT: master.detach(), **kept}


def _make_states(
    base: torch.optim.Optimizer, master: Tensor, kinds: dict[str, torch.dtype], known: dict[str, Any]
) -> None:
    """The states that the optimizer makes at its first step, or those that it has already."""
    state = base.state[master]
    for kind, dtype in kinds.items():
        if kind not in state:
            state[kind] = torch.zeros_like(master, dtype=dtype, requires_grad=False)
    if known["optimizer_step"] is not None:
        # torch's fused optimizers keep the count beside the parameters.
        device = master.device if base.defaults.get("fused") else "cpu"
        state["step"] = torch.tensor(float(known["optimizer_step"]), dtype=torch.float32, device=device)


def _places(engine: Any, part: Part, everything: bool) -> Iterator[Sequence[_Place]]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _places_of_stage_3(optimizer, everything)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield _partitioned_places(optimizer)
    elif isinstance(optimizer, BF16_Optimizer):
        yield _mapped_places(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    elif isinstance(optimizer, torch.optim.Optimizer):
        yield _replicated_places(optimizer, part, everything)
    else:
        raise TypeError(f"DeepSpeed's {type(optimizer).__name__} isn't known here")


def _partitioned_places(zero: Any) -> list[_Place]:
    """ZeRO 1 and 2: parameters lie in one flat buffer, of which each rank has an equal run.

    DeepSpeed's own links are wrong where `round_robin_gradients` has changed their order (stage_1_and_2.py:824).
    """
    places = []
    for number, master in enumerate(zero.single_partition_of_fp32_groups):
        first = torch.distributed.get_rank(group=zero.real_dp_process_group[number]) * zero.partition_size[number]
        in_order = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
        for parameter, offset in in_order:
            start = max(offset, first)
            stop = min(offset + parameter.numel(), first + zero.partition_size[number])
            if start < stop:
                places.append(_Place(parameter, master, start - first, start - offset, stop - start))
    return places


def _mapped_places(groups: Sequence[Sequence[nn.Parameter]], masters: Sequence[Tensor]) -> list[_Place]:
    """The bf16 optimizer: DeepSpeed has linked each parameter to its run of the flat partition."""
    places = []
    for group, master in zip(groups, masters, strict=True):
        for parameter in group:
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            if link is not None:
                inside, outside = link.lp_fragment_address, link.hp_fragment_address
                places.append(_Place(parameter, master, outside.start, inside.start, inside.numel))
    return places


def _places_of_stage_3(zero: Any, everything: bool) -> Iterator[list[_Place]]:
    """Each parameter is cut in equal runs, the last ones padded; what lies on disk is brought here and back."""
    for number, group in enumerate(zero.fp16_groups):
        swapped = zero._swappable_optimizer_subgroup(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        places = []
        for parameter in group:
            _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * length
            numel = min(length, parameter.ds_numel - start)
            places.append(_Place(parameter, zero.fp32_partitioned_groups_flat[number], offset, start, numel))
        yield places
        if swapped and everything:
            zero._optimizer_states_and_gradient_swap_out(number)
        elif swapped:
            zero._release_swap_buffers(number)


def _replicated_places(optimizer: torch.optim.Optimizer, part: Part, everything: bool) -> list[_Place]:
    """Without ZeRO every replica has all: each gives an equal share."""
    place, layout = part.mesh.place, part.mesh.layout
    replicas, index = layout.data * layout.sequence, place.data * layout.sequence + place.sequence
    places = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            total = parameter.numel()
            start, stop = (0, total) if everything else (total * index // replicas, total * (index + 1) // replicas)
            places.append(_Place(parameter, parameter, start, start, stop - start))
    return places


def _publish(engine: Any) -> None:
    """Bring the fp32 weights to the model, over all ranks."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            if not optimizer._swappable_optimizer_subgroup(number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
                continue
            optimizer._optimizer_states_and_gradient_swap_in(number)
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer._release_swap_buffers(number)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _base_optimizer(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _moving_parts(scaler: Any) -> dict[str, float]:
    keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {key: getattr(scaler, key) for key in keys}
