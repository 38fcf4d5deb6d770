"""The gradient noise scale (arXiv 1812.06162, appendix A.1): how large a batch still pays, measured during a run.

The squared norm of a mean gradient over b labels is that of the true gradient plus noise / b, in expectation. A step
shows it at two b: its micro-batches', from hooks on the parameters, and the global batch's, which the step has anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_train.data.batches import count_labels
from ds_train.engine.ranks import all_sum

if TYPE_CHECKING:
    from ds_train.engine.build import Assembly


class MicroGradients:
    """Squared norms of the gradients of one step's micro-batches; hooks are there inside of the block alone."""

    def __init__(self, parts: Assembly) -> None:
        self._parts, self._square = parts, torch.zeros((), dtype=torch.float64, device=parts.engine.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=parts.engine.device)
        self._handles: list[Any] = []

    def __enter__(self) -> MicroGradients:
        group = self._parts.part.mesh.tensor
        first = group is None or torch.distributed.get_rank(group) == 0
        for parameter in self._parts.model.parameters():
            # What every tensor rank has whole counts once.
            if parameter.requires_grad and (first or hasattr(parameter, "tensor_shard")):
                self._handles.append(parameter.register_hook(self._add))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def end_of_micro_batch(self, batch: Mapping[str, Tensor], weight: float) -> None:
        """The backward pass of `batch`, whose summed loss was multiplied by `weight`, has ended."""
        group = self._parts.part.mesh.tensor
        if group is not None:
            torch.distributed.all_reduce(self._square, group=group)
        labels = count_labels([batch])
        if labels:
            mean = weight / self._parts.engine.gradient_accumulation_steps() * labels
            self._sums += torch.stack(
                [self._square / mean**2, self._square.new_tensor(1 / labels), self._square.new_ones(())]
            )
        self._square.zero_()

    def scale(self, grad_norm: float, labels: int) -> dict[str, float]:
        """`gradient_noise` and `gradient_signal` of the step, unbiased; their means' ratio is the scale, in labels.

        Collective. `grad_norm` and `labels` are the global batch's. Nothing from a single micro-batch.
        """
        place = self._parts.part.mesh.place
        square, inverse_labels, micro_batches = all_sum(self._sums * (place.tensor == 0)).tolist()
        if micro_batches < 2:
            return {}
        # A micro-batch's noise goes by 1 / its labels.
        small, big = micro_batches / inverse_labels, float(labels)
        small_square, big_square = square / micro_batches, grad_norm**2
        noise = (small_square - big_square) / (1 / small - 1 / big)
        signal = (big * big_square - small * small_square) / (big - small)
        return {"gradient_noise": noise, "gradient_signal": signal}

    def _add(self, gradient: Tensor) -> None:
        self._square += gradient.detach().double().square().sum()


def steps_of_this_model(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of kind `train` among a run's metrics, of steps of the model as it is now: those since its last cut."""
    cuts = [place for place, record in enumerate(records) if record["kind"] == "cut"]
    return [record for record in records[cuts[-1] if cuts else 0 :] if record["kind"] == "train"]


def noise_scale(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Labels of a batch at which noise and signal are equal, over all measurements of a model; None without any.

    Batches well below it are too noisy to take larger steps, well above it labels are wasted.
    """
    found = [(record["gradient_noise"], record["gradient_signal"]) for record in records if "gradient_noise" in record]
    noise, signal = (sum(column) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
    return noise / signal if signal > 0 else None
