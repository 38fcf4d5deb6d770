"""Distillation in a run: what a micro-batch is trained on beside its labels.

Shapes: B samples, T tokens, D hidden of the model, N = B x T.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.compress.distill_loss import Distillation, Targets
from ds_train.compress.teacher import Teacher, first_tensor
from ds_train.compress.teacher_cache import TeacherCache
from ds_train.config.distill import DistillSection
from ds_train.models.load import fold_seed
from ds_train.models.loss import IGNORE_INDEX, ChunkLoss, CrossEntropy, VocabularyShard
from ds_train.models.tasks import Batch
from ds_train.models.token_drop import repeated_layers

PROJECTIONS = "distill_projections"
"""Name in the model of the matrices from its hidden states to the teacher's; they aren't exported."""


class Distilling:
    """An `Objective`: the labels and a teacher."""

    def __init__(self, section: DistillSection, teacher: Teacher | TeacherCache) -> None:
        self._section, self._teacher = section, teacher
        self.alpha = section.alpha
        """Share of the teacher's logits in the loss from now on."""
        self._hidden: HiddenStates | None = None

    def compare_layers(self, model: PreTrainedModel, pairs: list[tuple[int, int]]) -> None:
        """From now on the layers' outputs are compared too; `model` has projections (`add_projections`)."""
        assert isinstance(self._teacher, Teacher)
        self._hidden = HiddenStates(model, self._teacher, pairs, self._section.hidden)

    def chunk_loss(self, batch: Batch, shard: VocabularyShard | None) -> ChunkLoss:
        """See `Objective`."""
        if self._hidden is not None:
            self._hidden.begin(batch)
        targets: Targets = self._teacher.targets(batch)
        labels_N = batch["labels"].reshape(-1)
        if self._section.logits == "none":
            return CrossEntropy(labels_N, shard)
        return Distillation(self._section.logits, self._section.temperature, self.alpha, labels_N, targets, shard)

    def extra_loss(self) -> Tensor | None:
        """See `Objective`."""
        return None if self._hidden is None else self._hidden.end()


class HiddenStates:
    """Mean squared differences of layers' outputs, taken by hooks while the model runs."""

    def __init__(self, model: Any, teacher: Teacher, pairs: list[tuple[int, int]], weight: float) -> None:
        self._weight = weight / len(pairs)
        self._theirs: dict[int, Tensor] = {}
        self._weights_BT: Tensor | None = None
        self._sum: Tensor | None = None
        layers, projections = repeated_layers(model), [*model.get_submodule(PROJECTIONS).children()]
        for number, (own, other) in enumerate(pairs):
            teacher.layers[other].register_forward_hook(partial(self._keep, number))
            layers[own].register_forward_hook(partial(self._compare, number, projections[number]))

    def begin(self, batch: Batch) -> None:
        """The next forward passes, the teacher's first, are of this micro-batch."""
        labels, tokens_BT = batch["labels"], batch["input_ids"]
        counts_B1 = (labels != IGNORE_INDEX).view(len(labels), -1).sum(-1, keepdim=True)
        mask = batch.get("attention_mask")
        real_BT = mask if mask is not None and mask.dim() == 2 else torch.ones_like(tokens_BT)
        self._weights_BT = counts_B1 * real_BT / real_BT.sum(-1, keepdim=True).clamp(min=1)
        self._sum = None

    def end(self) -> Tensor | None:
        """The loss of the model's forward pass."""
        total, self._sum, self._weights_BT = self._sum, None, None
        self._theirs.clear()
        return total

    def _keep(self, number: int, _: nn.Module, __: Any, output: Any) -> None:
        self._theirs[number] = first_tensor(output)

    def _compare(self, number: int, projection: nn.Module, _: nn.Module, __: Any, output: Any) -> None:
        if self._weights_BT is None or not torch.is_grad_enabled():
            return
        difference_BTD = projection(first_tensor(output)).float() - self._theirs[number].float()
        loss: Tensor = self._weight * (difference_BTD.square().mean(-1) * self._weights_BT).sum()
        self._sum = loss if self._sum is None else self._sum + loss


def add_projections(model: nn.Module, outline: nn.Module, count: int, widths: tuple[int, int], seed: int) -> None:
    """Give `model`, and its `outline` if that is another one, a matrix per pair of layers, from (D) to the teacher's.

    They start as the identity, cut or filled with rows drawn from the seed.
    """
    dtype = next(parameter.dtype for parameter in model.parameters())
    draw = torch.Generator().manual_seed(fold_seed(seed, PROJECTIONS))
    own, other = widths
    weights = []
    for _ in range(count):
        weight = torch.randn(other, own, generator=draw) * own**-0.5
        weight[: min(widths)] = torch.eye(min(widths), own)
        weights.append(weight)
    for owner, device in {id(outline): (outline, "meta"), id(model): (model, "cpu")}.values():
        layers = [nn.Linear(own, other, bias=False, device=device, dtype=dtype) for _ in weights]
        if device != "meta":
            with torch.no_grad():
                for layer, weight in zip(layers, weights, strict=True):
                    layer.weight.copy_(weight)
        owner.add_module(PROJECTIONS, nn.ModuleList(layers))
