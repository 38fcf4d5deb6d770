"""Samples -> micro-batches of this rank. The global batch of a step is the same at every number of ranks.

Shapes: B samples of a micro-batch, T tokens.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_train.data.eval_sources import EvalSource
from ds_train.data.ledger import Portion, portions_of
from ds_train.data.order import Order
from ds_train.data.samples import (
    IGNORE_INDEX,
    MaskedSamples,
    Sample,
    Samples,
    cut_sample,
    patch_sample,
    restarting_positions,
)
from ds_train.schedule.timeline import StepShape

Item = TypeVar("Item")
Micro = list[dict[str, Tensor]]
"""A rank's micro-batches of a step."""

LOADER = "loader"
"""Name of the thread that loads samples ahead."""

_PAD_MULTIPLE = 8


class Collator:
    """Makes a micro-batch out of samples.

    input_ids (B, T) and labels (B, T), or (B,) for classification, all int64; position_ids (B, T) where samples are
    packed; attention_mask (B, T) where they are padded. With `block_mask`, for encoders, packed documents are kept
    apart by a boolean attention_mask (B, 1, T, T) where any window has more than one; causal models go by position ids.
    Those count from `first_position`.
    With `padding_free` samples lie end to end in one row (1, their tokens), with position_ids, as packed ones.
    """

    def __init__(
        self, pad_token: int, length: int, block_mask: bool, padding_free: bool = False, first_position: int = 0
    ) -> None:
        self._pad_token, self.length, self._block_mask = pad_token, length, block_mask
        self._padding_free, self._first_position = padding_free, first_position

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The micro-batch of `samples`; padded ones as long as their longest, in multiples of 8."""
        if "position_ids" in samples[0]:
            batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
            return self._separated(batch)
        if self._padding_free:
            return self._separated(self._one_row(samples))
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = min(self.length, -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE)
        shape = (len(samples), width)
        per_token = samples[0]["labels"].ndim == 1
        input_ids = torch.full(shape, self._pad_token)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape if per_token else shape[:1], IGNORE_INDEX)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            input_ids[row, :size] = torch.from_numpy(sample["input_ids"])
            attention_mask[row, :size] = 1
            if per_token:
                labels[row, :size] = torch.from_numpy(sample["labels"])
            else:
                labels[row] = int(sample["labels"])
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}

    def _one_row(self, samples: list[Sample]) -> dict[str, Tensor]:
        sizes = [len(sample["input_ids"]) for sample in samples]
        missing = -sum(sizes) % _PAD_MULTIPLE
        filling = {"input_ids": self._pad_token, "labels": IGNORE_INDEX}
        row = {
            key: np.concatenate([*(sample[key] for sample in samples), np.full(missing, value, dtype=np.int64)])
            for key, value in filling.items()
        }
        row["position_ids"] = restarting_positions(sizes, missing)
        return {key: torch.from_numpy(value)[None] for key, value in row.items()}

    def _separated(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._block_mask and bool(((batch["position_ids"] == 0).sum(1) > 1).any()):
            batch["attention_mask"] = documents_mask(batch["position_ids"])
        batch["position_ids"] += self._first_position
        return batch


def documents_mask(position_ids_BT: Tensor) -> Tensor:
    """Which tokens of a row are of one document: boolean (B, 1, T, T), by position ids that are 0 at its first one."""
    document_BT = (position_ids_BT == 0).cumsum(1)
    return document_BT[:, None, :, None] == document_BT[:, None, None, :]


class Batches:
    """Micro-batches of one data rank out of `data_ranks`."""

    def __init__(
        self, samples: Samples | MaskedSamples, collate: Collator, order: Order, global_samples: int,
        micro_samples: int, data_rank: int, data_ranks: int, name_samples: bool = False,
    ) -> None:  # fmt: skip
        """`name_samples`: training micro-batches have `sample_ids` (B,), other ones for every sample of the run."""
        self._samples, self._collate, self.order = samples, collate, order
        self._global, self._micro = global_samples, micro_samples
        self._rank, self._ranks = data_rank, data_ranks
        self._length, self._name_samples = collate.length, name_samples

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """Micro-batches of this rank in optimizer step `step` (from 0) of a run whose steps are all alike.

        Step k takes the run's samples k * global to (k + 1) * global - 1; a micro-batch at a time they go to the ranks
        in turn.
        """
        return self.take(StepShape(step, self._global, self._length, 0, step * self._global, 1))

    def take(self, shape: StepShape) -> list[dict[str, Tensor]]:
        """Micro-batches of this rank in a step of that shape, in the order of accumulation.

        With more samples than the global batch micro-batches are larger, and no more.
        """
        mine = self.slots(shape)
        batches = [self._collate(self._take(row, shape)) for row in mine]
        if self._name_samples:
            for row, batch in zip(mine, batches, strict=True):
                batch["sample_ids"] = torch.from_numpy(row // shape.parts + (row % shape.parts << 40))
        return batches

    def slots(self, shape: StepShape) -> NDArray[np.int64]:
        """Numbers along the run of this rank's samples in a step of that shape: (micro-batches, B)."""
        if self._global % (self._ranks * self._micro):
            raise ValueError(f"{self._global} samples can't be dealt to {self._ranks} ranks by {self._micro}")
        slots = np.arange(shape.first, shape.first + shape.samples)
        return slots.reshape(-1, self._ranks, self._micro * shape.samples // self._global)[:, self._rank]

    def steps(self, shapes: Callable[[], Iterator[StepShape]], workers: int) -> Iterator[tuple[StepShape, Micro]]:
        """(shape, micro-batches) of each step, loaded ahead by a thread where `workers` is above 0."""

        def load() -> Iterator[tuple[StepShape, Micro]]:
            return ((shape, self.take(shape)) for shape in shapes())

        return prefetch(load, workers) if workers else load()

    def eval(self, num_samples: int, source: EvalSource | None = None) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of the first `num_samples` samples (all, if there are fewer), in their own order.

        With `source` of those that have text of it, and with its labels alone. Every rank yields equally many, since a
        forward pass may be collective; places beyond the end are repeats of the first sample with every label left out.
        """
        numbers = range(len(self._samples)) if source is None else source.samples
        numbers = numbers[:num_samples]
        total = len(numbers)

        def sample(place: int) -> Sample:
            number = numbers[place if place < total else 0]
            found = self._sample(number, number)
            if place >= total:
                return {**found, "labels": np.full_like(found["labels"], IGNORE_INDEX)}
            return found if source is None else source.alone(found, number, self._samples)

        for start in range(self._rank * self._micro, total + self._rank * self._micro, self._micro * self._ranks):
            yield self._collate([sample(place) for place in range(start, start + self._micro)])

    def portions(self, slots: Iterable[int], shape: StepShape) -> list[Portion]:
        """The documents in samples number `slots` of a step of that shape, in their order."""
        return [portion for slot in slots for portion in portions_of(self._samples, self.order, shape, slot)]

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self._samples)

    def of_samples(self, samples: Iterable[int]) -> dict[str, Tensor]:
        """The micro-batch of samples by their number, whatever the order of the run."""
        return self._collate([self._sample(sample, 0) for sample in samples])

    def label_counts(self, samples: Iterable[int]) -> NDArray[np.int64]:
        """Labels of each of those: (samples,)."""
        labels = (self._sample(sample, 0)["labels"] for sample in samples)
        return np.array([int((one != IGNORE_INDEX).sum()) for one in labels], dtype=np.int64)

    def _take(self, slots: NDArray[np.int64], shape: StepShape) -> list[Sample]:
        """The samples of numbers `slots` (B,) along the run, where all have that shape."""
        places, parts, length = slots // shape.parts, slots % shape.parts, shape.length
        if length >= self._length:
            cuts: list[tuple[int, int | None]] = [(0, None)] * len(parts)
        else:
            cuts = [(part * length, (part + 1) * length) for part in parts.tolist()]
        numbers = zip(self.order.index(places).tolist(), places.tolist(), cuts, strict=True)
        samples = [self._sample(index, place, *cut) for index, place, cut in numbers]
        return samples if shape.patch == 1 else [patch_sample(sample, shape.patch) for sample in samples]

    def _sample(self, index: int, place: int, start: int = 0, stop: int | None = None) -> Sample:
        if isinstance(self._samples, MaskedSamples):
            return self._samples.at(index, place, start, stop)
        return cut_sample(self._samples[index], start, stop)


def count_labels(micro_batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Labels of the micro-batches that are predicted: those other than IGNORE_INDEX."""
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)


def prefetch(make: Callable[[], Iterator[Item]], depth: int) -> Iterator[Item]:
    """The items of `make()`, produced by a thread up to `depth` ahead. Its exception is raised here, at its place.

    The thread is woken for several items at once: it shares the interpreter with whoever takes them.
    """
    items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room: queue.SimpleQueue[int] = queue.SimpleQueue()  # how many more may be put
    at_once = (depth + 1) // 2
    stopped = threading.Event()

    def produce() -> None:
        left = depth
        try:
            for item in make():
                if not left:
                    left = room.get()
                if stopped.is_set():
                    return
                items.put((True, item))
                left -= 1
            items.put((False, None))
        except BaseException as error:  # whatever it is, the consumer is the one to know
            items.put((False, error))

    thread = threading.Thread(target=produce, name=LOADER, daemon=True)
    thread.start()
    try:
        for taken in itertools.count(1):
            more, item = items.get()
            if more:
                if taken % at_once == 0:
                    room.put(at_once)
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        stopped.set()
        room.put(1)
        thread.join(timeout=5)
