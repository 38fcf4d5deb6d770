"""Weights that are zero: which ones may go, and that they stay zero while a sparse model is trained.

Shapes: O outputs, I inputs of a matrix, B inputs of a block, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_train.compress.gptq import inverse_factor

Score = Literal["magnitude", "wanda", "sparsegpt"]

_BLOCK = 128


@dataclass(frozen=True)
class Pattern:
    """Zeros of a row: `zeros` in each `group` of neighbours, or a `share` of all where `group` is 0."""

    share: float
    group: int = 0

    @property
    def zeros(self) -> int:
        """Zeros of a group."""
        return round(self.share * self.group)

    def kept(self, scores_OI: Tensor) -> Tensor:
        """Which weights stay: (O, I) bool, those of the highest scores."""
        group = self.group or scores_OI.shape[-1]
        count = self.zeros if self.group else round(self.share * group)
        grouped = scores_OI.unflatten(-1, (-1, group))
        lowest = grouped.argsort(dim=-1, stable=True)[..., :count]
        return torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, lowest, False).flatten(-2)


def thin(weight_OI: Tensor, products_II: Tensor | None, pattern: Pattern, score: Score) -> Tensor:
    """The matrix with zeros: (O, I), in its format.

    `magnitude` scores a weight by its size, `wanda` (arXiv 2306.11695) by that times the norm of its input; `sparsegpt`
    (arXiv 2301.00774) lets the inputs that are left make up for what goes.

    Args:
        products_II: sum over tokens of x x^T for the layer's inputs x; not for `magnitude`.
    """
    if score == "magnitude" or products_II is None:
        return weight_OI * pattern.kept(weight_OI.abs())
    if score == "wanda":
        return weight_OI * pattern.kept(weight_OI.abs().float() * products_II.diagonal().sqrt())
    return _sparsegpt(weight_OI, products_II, pattern)


def _sparsegpt(weight_OI: Tensor, products_II: Tensor, pattern: Pattern) -> Tensor:
    exact = weight_OI.float().clone()
    upper = inverse_factor(exact, products_II)
    inputs = exact.shape[1]
    size = max(1, _BLOCK // pattern.group) * pattern.group if pattern.group else _BLOCK
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        kept_OB = torch.empty_like(exact[:, start:stop], dtype=torch.bool)
        errors_OB = torch.empty_like(exact[:, start:stop])
        group = pattern.group or stop - start
        for place in range(start, stop):
            if (place - start) % group == 0:
                part = slice(place, place + group)
                scores = exact[:, part].abs() / upper.diagonal()[part]
                kept_OB[:, place - start : place - start + group] = pattern.kept(scores)
            left_O = exact[:, place] * kept_OB[:, place - start]
            error_O = (exact[:, place] - left_O) / upper[place, place]
            exact[:, place] = left_O
            exact[:, place + 1 : stop] -= torch.outer(error_O, upper[place, place + 1 : stop])
            errors_OB[:, place - start] = error_O
        exact[:, stop:] -= errors_OB @ upper[start:stop, stop:]
    return exact.to(weight_OI.dtype)


def zeros_among(linear: list[Any]) -> Tensor:
    """(2,) float64: weights of these layers that are zero, and all of them, as far as they are on this rank."""
    counts = torch.zeros(2, dtype=torch.float64)
    for module in linear:
        held = getattr(module.weight, "ds_tensor", module.weight).detach()  # this rank's share under ZeRO-3
        counts += torch.tensor([int((held == 0).sum()), held.numel()], dtype=torch.float64)
    return counts


def keep_zeros(linear: list[Any]) -> None:
    """Let the weights of these layers that are zero stay so: they get no gradient, and no optimizer moves them then.

    The weights themselves say which, so that a mask is nowhere kept, sharded or saved.
    """
    for module in linear:
        parameter: nn.Parameter = module.weight
        parameter.register_hook(lambda gradient, parameter=parameter: gradient * (parameter.detach() != 0))
