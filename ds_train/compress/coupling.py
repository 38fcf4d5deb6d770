"""What goes together when a unit of a model goes: which elements of which parameters, and where its output passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HEADS, FFN, EXPERTS, HIDDEN, LAYERS = "heads", "ffn", "experts", "hidden", "layers"
OF_MODEL = (HIDDEN, LAYERS)
"""Kinds whose units belong to the whole model; their coupling has the number 0."""

Removed = Mapping[str, Mapping[int, Sequence[int]]]
"""Units that go, by kind and number of the coupling, the first to close first."""


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter in which every unit has `each` elements: in each of `parts` equal stretches of the
    dimension, `each / parts` in a row."""

    name: str
    dim: int
    each: int
    parts: int = 1

    def indices(self, kept: Sequence[int], units: int) -> Tensor:
        """Where the elements of units `kept`, of `units`, lie in the dimension: int64."""
        row = self.each // self.parts
        inside = torch.tensor(kept)[:, None] * row + torch.arange(row)
        return torch.cat([inside.flatten() + part * units * row for part in range(self.parts)])


@dataclass(frozen=True)
class Gate:
    """A module through which the units' outputs pass, `each` channels in a row.

    As the `input` of a matrix; through a `norm`, whose mean and variance they are part of; as logits of a `router`,
    one each; or as all that a `layer`, which is unit number `unit`, adds.
    """

    module: str
    how: Literal["input", "norm", "router", "layer"]
    each: int = 1
    dim: int = 0
    """Dimension of an `input`'s matrix along which the channels lie."""
    unit: int = 0


@dataclass(frozen=True)
class Coupling:
    """Units, of one layer or of the whole model, their elements, and where they pass."""

    kind: str
    number: int
    units: int
    members: tuple[Member, ...]
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Structure:
    """The couplings of a model; `layers` is the name of its list of `count` layers."""

    couplings: tuple[Coupling, ...]
    layers: str
    count: int

    def of_kind(self, kind: str) -> tuple[Coupling, ...]:
        """The couplings of a kind, in order."""
        return tuple(coupling for coupling in self.couplings if coupling.kind == kind)

    def layer_of(self, name: str) -> int | None:
        """Number of the layer that a parameter belongs to; None outside of the layers."""
        match = re.match(re.escape(self.layers) + r"\.(\d+)\.", name)
        return int(match[1]) if match else None
