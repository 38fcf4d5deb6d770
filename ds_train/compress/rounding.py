"""Weights and activations as small integers with scales: the arithmetic, and its gradient for training.

Symmetric around 0: the largest of what shares a scale is half of the range of integers, as compressed-tensors has it
(quantization/utils/helpers.py: calculate_qparams), which reads what is exported. Or a hair less: -127.5 is a tie, where
the last bit of a scale, which differs between layouts, would decide between two integers.
Shapes: O outputs, I inputs of a matrix, G groups of inputs that share a scale (1 without groups).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits; `group` inputs share a scale, all of a row where it is 0."""

    bits: int
    group: int = 0

    @property
    def least(self) -> int:
        """The lowest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        """The highest integer."""
        return 2 ** (self.bits - 1) - 1

    def scales(self, weight_OI: Tensor, ranks: Any = None) -> Tensor:
        """The scale of each group: (O, G), in the format of the weight.

        `ranks`: the process group that the inputs are cut over, None where they are whole.
        """
        largest_OG = self._grouped(weight_OI.detach()).abs().amax(-1)
        if ranks is not None and not self.group:
            dist.all_reduce(largest_OG, op=dist.ReduceOp.MAX, group=ranks)
        return _scale(largest_OG, self).to(weight_OI.dtype)

    def integers(self, weight_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """The nearest integers: (O, I) int8."""
        exact = self._grouped(weight_OI.detach().float()) / scales_OG.float()[..., None]
        return exact.round_().clamp_(self.least, self.most).to(torch.int8).view(weight_OI.shape)

    def values(self, integers_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """What integers and scales stand for: (O, I), in the format of the scales."""
        return (self._grouped(integers_OI).to(scales_OG.dtype) * scales_OG[..., None]).view(integers_OI.shape)

    def rounded(self, weight_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """The weights that integers can say, nearest to these."""
        return self.values(self.integers(weight_OI, scales_OG), scales_OG)

    def _grouped(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.unflatten(-1, (-1, self.group or weight_OI.shape[-1]))


_HAIR = 2.0**-16

TOKENS = Grid(8)
"""Integers of activations, with one scale a token."""


def round_tokens(hidden: Tensor, ranks: Any = None) -> Tensor:
    """Activations (..., I) rounded to 8 bits with a scale per token; the gradient goes straight through.

    `ranks`: the process group that I is cut over, None where it is whole.
    """
    largest = hidden.detach().abs().amax(-1, keepdim=True)
    if ranks is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
    scale = _scale(largest, TOKENS)
    return straight_through(hidden, lambda: (hidden / scale).round_().clamp_(TOKENS.least, TOKENS.most).mul_(scale))


def straight_through(value: Tensor, rounded: Callable[[], Tensor]) -> Tensor:
    """What `rounded` gives, whose gradient is that of `value` (arXiv 1308.3432).

    Nothing is cut off: scales follow the largest value, which is less than one step beyond the highest integer.
    """
    return _StraightThrough.apply(value, rounded)


def _scale(largest: Tensor, grid: Grid) -> Tensor:
    scale = largest * ((1 + _HAIR) * 2 / (grid.most - grid.least))
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Callable[[], Tensor]) -> Tensor:
        return rounded()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None
