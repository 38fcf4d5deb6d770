"""Bytes that each rank needs at its peak: states by ZeRO stage, activations, buffers, and what libraries take.

The arithmetic is that of DeepSpeed's code as it is called here, not of the papers: its optimizers differ in what they
keep (paths under the installed deepspeed/runtime, version 0.19). Sizes are bytes unless they say elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ds_train.config import RunConfig
from ds_train.config.model import ModelSection
from ds_train.plan.activations import Activations, Work
from ds_train.plan.deepspeed_json import bucket_elements
from ds_train.plan.model_size import model_size
from ds_train.plan.outline import Outline
from ds_train.plan.shares import Share, Shares
from ds_train.plan.topology import Layout

Offload = Literal["none", "cpu", "nvme"]

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENTS = {"adamw": 2, "adam": 2, "adagrad": 1, "sgd": 1}
# Gradients that DeepSpeed copies side by side for one all-reduce (engine.py: buffered_allreduce_fallback).
_ALL_REDUCE_ELEMENTS = 500_000_000

_PREFETCHED = 50_000_000
"""Parameters of a teacher in shares that are gathered ahead (zero/config.py: prefetch_bucket_size)."""

_RUNTIME_ON_DEVICES = 1.5 * 2**30
"""Driver context, libraries' workspaces and communicators of a device."""

_GAPS_ON_DEVICES = 0.06
"""Share of what comes and goes within a step that a device's caching allocator loses to gaps."""

_RUNTIME_ON_CPU = 20 * 2**20
"""What a CPU process takes after its imports beside tensors."""

# The C library's heap on CPUs. Blocks of less than _MAPPED_BYTES (engine/ranks.py) live in it; with blocks of many
# sizes that come and go it grows to several times what they hold at once, and little of it is given back. A multiple of
# what layers keep in such blocks, and bytes for each of ZeRO-3's gathered parameters that lie between them, fitted to
# the Llama's layouts of benchmarks/planner.py.
_MAPPED_BYTES = 2**20
_HEAP_OF_SMALL_BLOCKS, _HEAP_OF_GATHERED = 4.2, 4.5


@dataclass(frozen=True)
class Choice:
    """All that memory and time depend on beside the model: one way to run a recipe.

    `stage` is the ZeRO stage that really runs.
    """

    layout: Layout
    stage: int
    micro_samples: int
    accumulation: int
    offload_optimizer: Offload = "none"
    offload_params: Offload = "none"
    checkpointing: bool = False

    @property
    def shards(self) -> int:
        """Ranks that ZeRO shards over: data and sequence ranks together (parallel/mesh.py)."""
        return self.layout.data * self.layout.sequence

    def in_flight(self, pipe_stage: int) -> int:
        """Micro-batches whose activations a pipeline stage holds at once (1F1B, pipe/schedule.py)."""
        return max(1, min(self.layout.pipe - pipe_stage, self.accumulation))


@dataclass(frozen=True)
class RankMemory:
    """Peak of the ranks of one pipeline stage: bytes by item on the device and in host memory.

    The items add up to the peak. On CPU ranks device and host are one, and `host` is empty.
    """

    stage: int
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Peak of the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Peak of what this rank takes of its host's memory, beside the device."""
        return sum(self.host.values())


class MemoryModel:
    """Predicts memory of one recipe's model in any layout."""

    def __init__(self, run: RunConfig, outline: Outline, arch: str, device: str) -> None:
        self.run, self._outline, self._device = run, outline, device
        self.shares = Shares(outline, arch, run.data.sequence_length)
        self.activations = Activations(outline, arch, self.shares)
        optimizer = run.optimizer
        self.moments = 0 if optimizer.kind == "sgd" and optimizer.momentum == 0 else _MOMENTS[optimizer.kind]
        self._one_group = optimizer.decay_all or optimizer.weight_decay == 0 or optimizer.kind == "adagrad"
        self.width = WIDTH[run.precision.dtype]
        self.teacher_elements = teacher_elements(run)

    def ranks(self, choice: Choice) -> list[RankMemory]:
        """The peak of each pipeline stage's ranks."""
        layout = choice.layout
        sizes = self.run.parallel.stage_layers if layout.pipe > 1 else None
        shares = self.shares.stages(layout.pipe, layout.tensor, sizes)
        return [self._rank(share, number, choice) for number, share in enumerate(shares)]

    def worst(self, choice: Choice) -> RankMemory:
        """The first, largest or last stage: that with the highest peak on its device."""
        layout = choice.layout
        sizes = self.run.parallel.stage_layers if layout.pipe > 1 else None
        shares = self.shares.stages(layout.pipe, layout.tensor, sizes)
        largest = max(range(len(shares)), key=lambda number: shares[number].elements)
        ranks = [self._rank(shares[number], number, choice) for number in {0, largest, len(shares) - 1}]
        return max(ranks, key=lambda rank: (rank.device_bytes, rank.host_bytes))

    def work(self, choice: Choice) -> Work:
        """The micro-batch of one rank."""
        run, layout = self.run, choice.layout
        attention = run.model.attention
        return Work(
            choice.micro_samples, run.data.sequence_length, layout.tensor, layout.sequence, self.width,
            choice.checkpointing, self._device, "sdpa" if attention == "auto" else attention, run.data.packing,
            run.model.lean_activations and not choice.checkpointing and not run.model.compile,
            run.compress.distill.logits != "none",
        )  # fmt: skip

    def accumulation_width(self, choice: Choice) -> int:
        """Bytes of an accumulated gradient's element (plan/deepspeed_json.py)."""
        alone = choice.accumulation == 1 and choice.stage >= 2
        if alone and choice.offload_optimizer == "none" and choice.layout.pipe == 1:
            return self.width
        return WIDTH[self.run.precision.gradient_dtype]

    def _teacher_bytes(self, share: Share, choice: Choice) -> tuple[float, float]:
        """(on the device, in host memory) on a stage that takes the loss or compares layers (compress/teacher.py)."""
        distill, layout = self.run.compress.distill, choice.layout
        if not runs_teacher(self.run, share, self.shares.layers):
            return 0, 0
        width = self.width if distill.dtype == "auto" else WIDTH[distill.dtype]
        size = self.teacher_elements * width
        if distill.placement == "memory":
            return size, 0
        gathered = min(self.teacher_elements, _PREFETCHED) * width
        own = size * layout.pipe / layout.ranks
        return (gathered + own, 0) if distill.placement == "sharded" else (gathered, own)

    @cached_property
    def bucket(self) -> int:
        """Elements of a communication bucket."""
        chosen = self.run.parallel.bucket_elements
        return bucket_elements(self._outline.elements) if chosen == "auto" else chosen

    # -- one rank ----------------------------------------------------------------------------------------------------

    def _rank(self, share: Share, number: int, choice: Choice) -> RankMemory:
        states = self._states(share, choice)
        work = self.work(choice)
        kept, recomputed = self.activations.stage(share, work)
        in_flight = choice.in_flight(number)
        masks = self.activations.masks(work)
        activations = kept * in_flight + recomputed + masks
        if choice.layout.pipe > 1:
            # What arrives and leaves, and their gradients.
            activations += 2 * (in_flight + 1) * work.tokens * self.activations.hidden * self.width
        loss = self.activations.loss(share, work)
        within = activations + loss + states.gathered + states.buckets
        after = max(states.reduction, states.step)
        steady = {
            "parameters": states.parameters,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            "buffers": states.buffers,
        }
        steady["teacher"], in_host_memory = self._teacher_bytes(share, choice)
        states.host["teacher"] = states.host.get("teacher", 0) + in_host_memory
        passing = {
            "activations": activations,
            "logits and loss": loss,
            "gathered": states.gathered,
            "buckets": states.buckets,
        }
        update = {"reduction and update": after}
        larger = passing if within >= after else update
        if self._device == "cpu":
            gaps = self._heap_gaps(share, work, in_flight, states.gathered)
            one = _added(steady | larger | {"gaps": gaps, "runtime": _RUNTIME_ON_CPU}, states.host)
            return RankMemory(number, _whole(one))
        gaps = _GAPS_ON_DEVICES * (max(within, after) + states.gradients)
        device = steady | larger | {"gaps": gaps, "runtime": _RUNTIME_ON_DEVICES}
        return RankMemory(number, _whole(device), _whole(states.host))

    def _heap_gaps(self, share: Share, work: Work, in_flight: int, gathered: float) -> float:
        """Bytes that a CPU rank's heap holds and doesn't use at the peak."""
        small = self.activations.in_blocks_below(_MAPPED_BYTES, share, work) * in_flight
        return _HEAP_OF_SMALL_BLOCKS * small + (_HEAP_OF_GATHERED * gathered / self.width if small else 0.0)

    def _states(self, share: Share, choice: Choice) -> _States:
        if choice.stage == 3:
            return self._stage_3(share, choice)
        if choice.stage == 0:
            return self._stage_0(share)
        return self._stages_1_and_2(share, choice)

    def _stage_0(self, share: Share) -> _States:
        """fp32 alone (plan/stage.py): torch's optimizer, gradients reduced through a copy of them."""
        elements, width = share.elements, self.width
        return _States(
            parameters=elements * width, gradients=elements * width, optimizer=elements * width * self.moments,
            reduction=min(elements, _ALL_REDUCE_ELEMENTS) * width,
        )  # fmt: skip

    def _stages_1_and_2(self, share: Share, choice: Choice) -> _States:
        shards, width, wide = choice.shards, self.width, self.accumulation_width(choice)
        # Groups are padded to an even number of elements per rank (zero/stage_1_and_2.py:267).
        padded = sum(math.ceil(group / (2 * shards)) * 2 * shards for group in share.groups(self._one_group))
        own = padded // shards
        masters = own * 4 * (1 + self.moments)
        states = _States(parameters=padded * width)
        all_on_device = choice.offload_optimizer == "none"
        if self.run.precision.dtype == "bf16" and choice.stage == 1 and wide == 4 and all_on_device:
            # DeepSpeed's BF16_Optimizer (engine.py:2306) keeps all gradients in both formats, and reduces copies.
            states.gradients = padded * 4 + share.elements * 2
            states.optimizer = masters
            states.reduction = min(share.elements, _ALL_REDUCE_ELEMENTS) * (4 + 2)
            return states
        bucket = min(self.bucket, share.elements) * width * (2 if self.overlaps(choice) else 1)
        # A parameter that is larger than a bucket is reduced by itself.
        states.buckets = bucket + (share.largest * width if share.largest > self.bucket else 0)
        if choice.stage == 1:
            states.gradients = share.elements * (width + (wide if wide != width else 0))
            states.reduction = own * wide
        else:
            states.gradients = own * wide
        states.step = own * 4
        if all_on_device:
            states.optimizer = masters
            return states
        # zero/stage_1_and_2.py:480: gradients go through two buffers of the largest parameter to fp32 host memory.
        states.buffers = share.largest * width
        states.host = {
            "optimizer": masters, "gradients": own * 4 + (own * width if choice.accumulation > 1 else 0),
            "buffers": own * width + share.largest * width,
        }  # fmt: skip
        if choice.stage == 2:
            states.gradients = 0
        states.step = 0
        return states

    def _stage_3(self, share: Share, choice: Choice) -> _States:
        shards, width, wide = choice.shards, self.width, self.accumulation_width(choice)
        threshold = min(100_000, self.bucket // 100)
        own = sum(-(-piece.elements // shards) * count for piece, count in share.pieces)
        whole = sum(piece.elements * count for piece, count in share.pieces if piece.elements <= threshold)
        masters = own * 4 * (1 + self.moments)
        live = min(share.elements, max(share.largest, 2 * self.bucket))
        copies = self.run.parallel.secondary_partition
        states = _States(
            buffers=self.bucket * width,
            gathered=(live + share.largest) * width,
            buckets=self.bucket * width if self.overlaps(choice) else 0,
            step=own * 4,
        )
        # ZeRO++ keeps a second copy of the weights among the ranks of a host (arXiv 2306.10209, section 3.2).
        second = share.elements // copies * width if copies > 1 else 0
        states.parameters = whole * width + second
        on_device, on_host = own * width, own * width
        if choice.offload_params == "none":
            states.parameters += on_device
        elif choice.offload_params == "cpu":
            states.host["parameters"] = on_host
        if choice.offload_optimizer == "none":
            states.optimizer, states.gradients = masters, own * wide
        else:
            states.step = 0
            states.host["gradients"] = own * wide
            if choice.offload_optimizer == "cpu":
                states.host["optimizer"] = masters
                states.host["gradients"] += own * 4
            else:
                # Buffers of four sub-groups of a hundred million elements (swap_tensor/optimizer_utils.py).
                states.host["optimizer"] = 4 * min(own, 10**8) * 4 * (1 + self.moments)
        return states

    def overlaps(self, choice: Choice) -> bool:
        """Whether gradients are reduced while the backward pass goes on."""
        asked = self.run.parallel.overlap_communication
        if asked == "auto":
            return self._device != "cpu" and choice.layout.ranks > 1 and choice.layout.pipe == 1
        return asked


def runs_teacher(run: RunConfig, share: Share, layers: int) -> bool:
    """Whether ranks with a stage of the model's `layers` run the teacher: to take the loss, or to compare layers."""
    distill = run.compress.distill
    compared: set[int] = set()
    if distill.hidden > 0:
        compared |= {own for own, _ in distill.hidden_layers or ()} or set(range(layers))
    if distill.relations > 0:
        compared |= {own for own, _ in distill.relation_layers or ()} or {layers - 1}
    return share.has_head or any(share.first <= layer < share.stop for layer in compared)


def teacher_elements(run: RunConfig) -> int:
    """Parameters of the recipe's teacher where it runs beside the model; 0 without one, or where it isn't known."""
    distill = run.compress.distill
    path = distill.teacher or run.model.path
    if not distill.active or distill.cache_top or path is None:
        return 0
    size = model_size(ModelSection(path=path), run.task.kind)
    return (size.parameters or 0) if size else 0


@dataclass
class _States:
    """Bytes on the device that don't depend on the micro-batch, and those in host memory."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    buffers: float = 0
    buckets: float = 0
    gathered: float = 0
    reduction: float = 0
    step: float = 0
    host: dict[str, float] = field(default_factory=dict)


def _added(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {key: first.get(key, 0) + second.get(key, 0) for key in [*first, *(k for k in second if k not in first)]}


def _whole(items: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in items.items() if size}
