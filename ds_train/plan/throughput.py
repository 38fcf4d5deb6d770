"""Seconds of an optimizer step, predicted: products, memory traffic, collectives, pipeline bubble, offload, update.

A roofline with collectives: work over what a device attains, bytes over what its memory and links carry, and a
latency for each. It ranks layouts; its absolute error on real machines is in docs/planner.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_train.plan.hardware import Hardware, Link
from ds_train.plan.memory import Choice, MemoryModel, runs_teacher
from ds_train.plan.shares import Share
from ds_train.plan.topology import Cluster

# Each byte that a layer keeps is written in the forward pass and read in the backward pass, and about as many are
# written and read that aren't kept (masks, residual sums, gradients of activations).
_TRAFFIC_PER_KEPT_BYTE = 4.0
# Operations of a layer's forward and backward pass, each with the least time of one.
_OPERATIONS_OF_LAYER = 110
# Seconds of a random number of torch's CPU generator, which draws one after the other.
_DRAW_ON_CPU_S = 8e-9
# Operations that the hooks of ZeRO-3 take for a module in each pass.
_OPERATIONS_OF_HOOKS = 100
# Share of the gradients' exchange that can hide behind the backward pass, where devices have streams.
_HIDDEN_SHARE = 0.7
# Queries, keys, values and output, which sequence ranks exchange (parallel/sequence.py).
_STATES_OF_ATTENTION = 4
_NEAREST_INT8 = 0.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they go to; they add up to `seconds`."""

    products: float
    memory: float
    tensor: float
    sequence: float
    pipeline: float
    data: float
    offload: float
    update: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        names = ("products", "memory", "tensor", "sequence", "pipeline", "data", "offload", "update")
        return {name: getattr(self, name) for name in names}


class TimeModel:
    """Predicts step times of one recipe's model on one kind of hardware."""

    def __init__(self, memory: MemoryModel, hardware: Hardware, cluster: Cluster) -> None:
        self._model, self._cluster = memory, cluster
        self._hardware = hardware.of_ranks(cluster.ranks_per_host)
        run = memory.run
        flops = self._hardware.flops
        # CPUs that multiply 16 bits more slowly than fp32 widen them (models/cpu_products.py).
        self._widens = self._hardware.device == "cpu" and flops[run.precision.dtype] <= flops["fp32"]
        self._flops = flops["fp32" if self._widens else run.precision.dtype] * self._hardware.attainable
        self._width = memory.width
        self._length = run.data.sequence_length

    def step(self, choice: Choice) -> StepTime:
        """Seconds of one step of the slowest pipeline stage, waiting for the others included."""
        layout, run = choice.layout, self._model.run
        sizes = run.parallel.stage_layers if layout.pipe > 1 else None
        shares = self._model.shares.stages(layout.pipe, layout.tensor, sizes)
        slowest = max(
            (self._micro_batch(share, choice) for share in _distinct(shares)), key=lambda parts: sum(parts)
        )  # fmt: skip
        products, memory, tensor, sequence = (part * choice.accumulation for part in slowest)
        busy = products + memory + tensor + sequence
        pipeline = busy * (layout.pipe - 1) / choice.accumulation
        if layout.pipe > 1:
            message = self._message(choice)
            link = self._link(layout.data * layout.sequence * layout.tensor, 2)
            # Forward and backward, both waited for; once more to fill the pipeline.
            pipeline += 2 * (choice.accumulation + layout.pipe - 1) * _seconds(message, link)
        largest = max(shares, key=lambda share: share.elements)
        data = self._data(largest, choice, backward=busy * 2 / 3)
        offload, update = self._update(largest, choice)
        return StepTime(products, memory, tensor, sequence, pipeline, data, offload, update)

    def tflops_per_device(self, choice: Choice) -> float:
        """Model TFLOP/s of each device, recomputation not counted, as papers count it."""
        return self.model_flops(choice) / self.step(choice).seconds / choice.layout.ranks / 1e12

    def model_flops(self, choice: Choice) -> float:
        """FLOPs of a step's forward and backward passes over the global batch (arXiv 2204.02311, appendix B)."""
        (share,) = self._model.shares.stages(1, 1)
        samples = choice.micro_samples * choice.accumulation * choice.layout.data
        attention = 2 * self._length * self._model.activations.attention_width * self._model.shares.layers
        return 6.0 * samples * self._length * (share.multiply_adds + attention)

    def exchanged(self, share: Share, choice: Choice) -> dict[str, int]:
        """Bytes of the messages of a step, whole, by kind of collective, that data and sequence ranks exchange.

        Of each a rank sends (n - 1) / n, twice that of an all-reduce. Gradients of ZeRO 0 and 1 go once a step, of 2
        and 3 with every micro-batch. ZeRO-3 gathers weights in each forward and backward pass, those of the head, where
        the one follows the other, once; what its `max_live_parameters` keeps between them is gathered less often.
        """
        if choice.shards == 1:
            return {}
        size, width, times = share.elements * self._width, self._width, choice.accumulation
        head = round(share.head_multiply_adds) * width
        messages = {
            0: {"all_reduce": size},
            1: {"all_reduce": size, "all_gather": size},
            2: {"all_reduce": size * times, "all_gather": size},
            3: {"all_gather": (2 * size - head) * times, "reduce_scatter": size * times},
        }[choice.stage]
        if choice.layout.sequence > 1:
            passes = 3 if choice.checkpointing else 2
            states = (share.stop - share.first) * _STATES_OF_ATTENTION * passes
            messages["all_to_all"] = states * self._message(choice) // choice.layout.tensor * times
        return messages

    # -- parts -------------------------------------------------------------------------------------------------------

    def _micro_batch(self, share: Share, choice: Choice) -> tuple[float, float, float, float]:
        """(products, memory, tensor, sequence) seconds of forward and backward of one micro-batch on a stage."""
        layout, model = choice.layout, self._model
        work = model.work(choice)
        layers = share.stop - share.first
        again = 4 if choice.checkpointing else 3
        body = share.multiply_adds - share.head_multiply_adds
        scores = 2 * self._length * model.activations.attention_width * layers / layout.tensor
        flops = 2 * work.tokens * (again * (body + scores) + 3 * share.head_multiply_adds)
        if runs_teacher(model.run, share, model.shares.layers):
            # The teacher's forward pass, whole on every rank that takes the loss (compress/teacher.py).
            flops += 2 * work.tokens * model.teacher_elements
        products = flops / self._flops
        kept, _ = model.activations.layers(share, work)
        traffic = kept * _TRAFFIC_PER_KEPT_BYTE * again / 3 + 3 * model.activations.loss(share, work)
        if self._widens:
            traffic *= 4 / self._width  # conversions cost as much
        # Weights are read in each pass, their gradients written and added.
        traffic += share.elements * self._width * (again + 2)
        memory = traffic / self._hardware.memory_bytes_per_second
        if self._hardware.device == "cpu":
            memory += model.activations.drawn(share, work) * (2 if choice.checkpointing else 1) * _DRAW_ON_CPU_S
        memory += layers * _OPERATIONS_OF_LAYER * again / 3 * self._hardware.kernel_s
        message = self._message(choice)
        tensor = sequence = 0.0
        if layout.tensor > 1:
            rows, columns = model.shares.exchanges
            link = self._link(1, layout.tensor)
            count = layers * (rows * (2 if choice.checkpointing else 1) + columns) + 2
            tensor = count * _all_reduce(message, layout.tensor, link)
        if layout.sequence > 1:
            link = self._link(layout.tensor, layout.sequence)
            share_sent = (layout.sequence - 1) / layout.sequence
            passes = 3 if choice.checkpointing else 2
            sequence = layers * _STATES_OF_ATTENTION * passes * (_seconds(message / layout.tensor * share_sent, link))
        return products, memory, tensor, sequence

    def _data(self, share: Share, choice: Choice, backward: float) -> float:
        """Seconds of ZeRO's collectives that aren't hidden."""
        ranks, run = choice.shards, self._model.run
        if ranks == 1:
            return 0.0
        link, messages = self._link(choice.layout.tensor, ranks), self.exchanged(share, choice)
        sent = (ranks - 1) / ranks
        buckets = max(1, math.ceil(share.elements / self._model.bucket))
        if choice.stage == 0:
            return _all_reduce(messages["all_reduce"], ranks, link)
        gathered = sent * messages["all_gather"]
        if choice.stage == 1:
            # Gradients of the whole step are all-reduced, then each rank's new weights are gathered.
            reduced = _all_reduce(messages["all_reduce"], ranks, link) + buckets * link.latency_s
            return self._visible(reduced, backward / choice.accumulation, choice) + gathered / link.bytes_per_second
        if choice.stage == 2:
            once = _all_reduce(messages["all_reduce"] / choice.accumulation, ranks, link) + buckets * link.latency_s
            reduced = self._visible(once * choice.accumulation, backward, choice)
            return reduced + gathered / link.bytes_per_second + buckets * link.latency_s
        shrunk = _NEAREST_INT8 if run.parallel.quantized_weights else 1.0
        forward = shrunk * sent * share.elements * self._width * choice.accumulation
        backward_again = shrunk * gathered - forward
        gradients = sent * messages["reduce_scatter"] * (_NEAREST_INT8 / 2 if run.parallel.quantized_gradients else 1.0)
        second = run.parallel.secondary_partition
        near = self._link(choice.layout.tensor, min(second, ranks)) if second > 1 else link
        # A gather per module with weights of its own, in the forward and in the backward pass.
        modules = sum(count for piece, count in share.pieces if piece.matrix)
        latency = modules * link.latency_s * (math.log2(ranks) + 1)
        exchange = (forward + gradients) / link.bytes_per_second + backward_again / near.bytes_per_second
        exchange += 3 * latency * choice.accumulation
        if self._hardware.device == "cpu":  # nothing runs beside DeepSpeed's own hooks
            exchange += 3 * modules * _OPERATIONS_OF_HOOKS * self._hardware.kernel_s * choice.accumulation
        return self._visible(exchange, backward * 1.5, choice)

    def _message(self, choice: Choice) -> int:
        """Bytes of the hidden states of a rank's tokens of a micro-batch."""
        return self._model.work(choice).tokens * self._model.activations.hidden * self._width

    def _visible(self, exchange: float, compute: float, choice: Choice) -> float:
        if not self._model.overlaps(choice):
            return exchange
        return max(exchange * (1 - _HIDDEN_SHARE), exchange - compute * _HIDDEN_SHARE)

    def _update(self, share: Share, choice: Choice) -> tuple[float, float]:
        """(seconds of offloaded states' journeys, seconds of the optimizer)."""
        hardware = self._hardware
        sharded = share.elements / (choice.shards if choice.stage > 0 else 1)
        # Gradient, master, moments are read, all but the gradient are written, and the model's weight.
        traffic = sharded * (4 + 2 * 4 * (1 + self._model.moments) + self._width)
        # The norm, the clipping, and the copy into fp32 before it.
        traffic += sharded * 4 * 4
        offload = 0.0
        if choice.offload_optimizer == "none":
            return 0.0, traffic / hardware.memory_bytes_per_second
        journeys = sharded * self._width
        offload += journeys * (choice.accumulation + 1) / hardware.host_link.bytes_per_second
        speed = hardware.host_memory_bytes_per_second
        if hardware.device == "cpu":
            speed = hardware.memory_bytes_per_second
        if choice.offload_optimizer == "nvme":
            offload += 2 * sharded * 4 * (1 + self._model.moments) / hardware.nvme_bytes_per_second
        if choice.offload_params != "none":
            speed_in = (
                hardware.host_link.bytes_per_second
                if choice.offload_params == "cpu"
                else hardware.nvme_bytes_per_second
            )
            offload += 3 * journeys * choice.accumulation / speed_in
        return offload, traffic / speed

    def _link(self, stride: int, ranks: int) -> Link:
        """The link of a group of `ranks` ranks, `stride` apart: its slowest part, shared as it is."""
        on_host = self._cluster.ranks_per_host
        if (ranks - 1) * stride < on_host:
            return self._hardware.near
        # Members of one host stand side by side in a ring, so that each brings its own way out of the host.
        members = max(1, on_host // stride)
        far, near = self._hardware.far, self._hardware.near
        return Link(min(near.bytes_per_second, far.bytes_per_second * members), far.latency_s)


def _distinct(shares: tuple[Share, ...]) -> list[Share]:
    """One stage of each kind: a long pipeline has few."""
    kinds = {(share.stop - share.first, share.elements, share.has_head): share for share in shares}
    return list(kinds.values())


def _seconds(message: float, link: Link) -> float:
    return message / link.bytes_per_second + link.latency_s


def _all_reduce(message: float, ranks: int, link: Link) -> float:
    """Seconds of a ring (or a tree, for its latency): every rank sends 2 (n - 1) / n of the message."""
    steps = 2 * min(ranks - 1, math.ceil(math.log2(ranks)) + 1)
    return 2 * (ranks - 1) / ranks * message / link.bytes_per_second + steps * link.latency_s
