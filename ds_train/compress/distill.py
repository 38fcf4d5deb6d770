"""Distillation in a run: what a micro-batch is trained on beside its labels.

Shapes: D hidden of the model, N tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ds_train.compress.compared import Comparison
from ds_train.compress.distill_loss import Distillation, Targets
from ds_train.compress.teacher import Teacher
from ds_train.compress.teacher_cache import TeacherCache
from ds_train.config.distill import DistillSection
from ds_train.models.loss import ChunkLoss, CrossEntropy, VocabularyShard
from ds_train.models.tasks import Batch
from ds_train.schedule.seeds import fold_seed

PROJECTIONS = "distill_projections"
"""Name in the model of the matrices from its hidden states to the teacher's; they aren't exported."""


class Distilling:
    """An `Objective`: the labels and a teacher."""

    def __init__(
        self, section: DistillSection, teacher: Teacher | TeacherCache, comparisons: Sequence[Comparison] = ()
    ) -> None:
        self._section, self._teacher, self._comparisons = section, teacher, comparisons
        self.alpha = section.alpha
        """Share of the teacher's logits in the loss from now on."""

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, where it is a model."""
        return self._teacher if isinstance(self._teacher, Teacher) else None

    def chunk_loss(self, batch: Batch, shard: VocabularyShard | None) -> ChunkLoss:
        """See `Objective`."""
        for comparison in self._comparisons:
            comparison.begin(batch)
        labels_N = batch["labels"].reshape(-1)
        if self._section.logits == "none":
            assert self.teacher is not None
            self.teacher.run(batch)
            return CrossEntropy(labels_N, shard)
        targets: Targets = self._teacher.targets(batch)
        return Distillation(self._section.logits, self._section.temperature, self.alpha, labels_N, targets, shard)

    def extra_loss(self) -> Tensor | None:
        """See `Objective`."""
        return sum_of(self._comparisons)


class TeacherBeside:
    """What a stage before a pipeline's last compares with the teacher, of which it has as many layers as it needs."""

    def __init__(self, teacher: Teacher, comparisons: Sequence[Comparison]) -> None:
        self.teacher, self._comparisons = teacher, comparisons

    def begin(self, batch: Batch) -> None:
        """Let the teacher see the micro-batch, and the model's layers next."""
        for comparison in self._comparisons:
            comparison.begin(batch)
        self.teacher.run(batch)

    def end(self) -> Tensor | None:
        """The loss of the stage's layers."""
        return sum_of(self._comparisons)


def sum_of(comparisons: Sequence[Comparison]) -> Tensor | None:
    """The loss of what layers are compared in, if any are on this rank."""
    losses = [loss for loss in (comparison.end() for comparison in comparisons) if loss is not None]
    return torch.stack(losses).sum() if losses else None


def add_projections(
    model: nn.Module, outline: nn.Module, count: int, widths: tuple[int, int], seed: int,
    own_pairs: Collection[int] | None = None,
) -> nn.ModuleDict:  # fmt: skip
    """Give `model`, and its `outline` if that is another one, a matrix per pair of layers, from (D) to the teacher's.

    They start as the identity, cut or filled with rows drawn from the seed. `model` has those of `own_pairs` alone,
    where it is a part; gives these.
    """
    dtype = next(parameter.dtype for parameter in model.parameters())
    draw = torch.Generator().manual_seed(fold_seed(seed, PROJECTIONS))
    own, other = widths
    weights = {}
    for number in range(count):
        weight = torch.randn(other, own, generator=draw) * own**-0.5
        weight[: min(widths)] = torch.eye(min(widths), own)
        weights[number] = weight
    for owner, device in {id(outline): (outline, "meta"), id(model): (model, "cpu")}.values():
        chosen = [*weights] if owner is outline or own_pairs is None else sorted(own_pairs)
        layers = {str(number): nn.Linear(own, other, bias=False, device=device, dtype=dtype) for number in chosen}
        if device != "meta":
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.weight.copy_(weights[int(name)])
        owner.add_module(PROJECTIONS, nn.ModuleDict(layers))
    return cast(nn.ModuleDict, model.get_submodule(PROJECTIONS))
