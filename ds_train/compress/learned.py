"""Gates that are learned: hard concrete ones (Louizos et al., arXiv 1712.01312), held to a number of open units.

A gate is a number from 0 to 1, drawn anew at every step, and 0 or 1 with a probability above 0. What is learned is its
log alpha: by the loss's gradient, under a penalty of the expected number of open gates (their L0 norm). The penalty's
weight is the Lagrange multiplier of that number, which falls in a line to the units that stay: after every step all log
alpha that share a number are lowered by one amount, so that it is met exactly. Shapes: U units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_train.schedule.seeds import fold_seed

Place = tuple[str, int]
"""Kind and number of a coupling."""

_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # temperature, and what the concrete distribution is stretched to
_FIRST_OPEN, _FIRST_SPREAD = 0.95, 0.03  # share of open gates, and range of log alpha, before anything is learned
_RATE = 2.0  # a log alpha's usual step, times the root of the number of steps
_HALVINGS = 80


@dataclass(frozen=True)
class Shared:
    """Couplings, with their numbers of units, that together keep `left` units."""

    units: Mapping[Place, int]
    left: int


class LearnedGates:
    """The log alpha of all units, (U,) fp64 for each coupling: a function of seed and gradients, in every layout."""

    def __init__(self, shared: Iterable[Shared], steps: int, seed: int) -> None:
        """
        Args:
            steps: how many `learn` is called for.
            seed: of the noise, besides a step's number and a unit's place.
        """
        self._shared = [own for own in shared if own.left < sum(own.units.values())]
        self._steps, self._seed = steps, seed
        self.learned = 0
        """Steps so far."""
        self.log_alpha: dict[Place, Tensor] = {}
        for own in self._shared:
            # Not all alike: units that hardly learn would have an order by rounding.
            first = {place: _FIRST_SPREAD * self._noise(-1, place, units) for place, units in own.units.items()}
            self._hold(own, first)

    def draw(self, step: int) -> dict[Place, Tensor]:
        """The gates of step `step` of the run: (U,) fp64 of each coupling that loses units."""
        return {
            place: hard_concrete(values, self._noise(step, place, len(values)))[0]
            for place, values in self.log_alpha.items()
        }

    def learn(self, step: int, gradients: Mapping[Place, Tensor]) -> None:
        """Go on by the loss's gradient by the gates that step `step` had. What isn't finite teaches nothing."""
        self.learned += 1
        slopes = {
            place: gradients[place] * hard_concrete(values, self._noise(step, place, len(values)))[1]
            for place, values in self.log_alpha.items()
        }
        rates = {kind: self._rate(kind, slopes) for kind in {kind for kind, _ in slopes}}
        for own in self._shared:
            moved = {
                place: self.log_alpha[place] - rates[place[0]] * slopes[place]
                if rates[place[0]]
                else self.log_alpha[place]
                for place in own.units
            }
            self._hold(own, moved)

    def _rate(self, kind: str, slopes: Mapping[Place, Tensor]) -> float:
        """What slopes of a kind are multiplied by: by the root mean square of all of them, not of each layer's own.

        An expert that is alone open, say, has a gradient of nothing but rounding.
        """
        of_kind = torch.cat([slope for (other, _), slope in slopes.items() if other == kind])
        size = float(of_kind.square().mean().sqrt())
        return _RATE / math.sqrt(self._steps) / size if 0.0 < size < math.inf else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as plain values."""
        values = [[*place, log_alpha.tolist()] for place, log_alpha in self.log_alpha.items()]
        return {"learned": self.learned, "log_alpha": values}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.learned = state["learned"]
        self.log_alpha = {
            (kind, number): torch.tensor(values, dtype=torch.float64) for kind, number, values in state["log_alpha"]
        }

    def _hold(self, own: Shared, log_alpha: Mapping[Place, Tensor]) -> None:
        """Keep these values, lowered to what the penalty allows after so many steps."""
        units = sum(own.units.values())
        first = max(_FIRST_OPEN * units, float(own.left))
        done = min(1.0, self.learned / self._steps)
        places = list(log_alpha)
        held = with_open(torch.cat([log_alpha[place] for place in places]), first + (own.left - first) * done)
        self.log_alpha |= dict(zip(places, held.split([own.units[place] for place in places]), strict=True))

    def _noise(self, step: int, place: Place, units: int) -> Tensor:
        """Uniform from 0 to 1 by a counter-based generator: a function of seed, step, coupling and unit."""
        draw = np.random.Generator(np.random.Philox(key=fold_seed(self._seed, "gates", step, *place)))
        return torch.from_numpy(draw.random(units))


def hard_concrete(log_alpha_U: Tensor, noise_U: Tensor) -> tuple[Tensor, Tensor]:
    """Gates from 0 to 1, and their derivatives by log alpha."""
    soft = ((noise_U.log() - (-noise_U).log1p() + log_alpha_U) / _BETA).sigmoid()
    wide = soft * (_HIGH - _LOW) + _LOW
    slope = (_HIGH - _LOW) * soft * (1.0 - soft) / _BETA
    return wide.clamp(0.0, 1.0), slope * ((wide > 0.0) & (wide < 1.0))


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate isn't 0."""
    return (log_alpha - _BETA * math.log(-_LOW / _HIGH)).sigmoid()


def with_open(log_alpha: Tensor, count: float) -> Tensor:
    """All values moved by one amount, so that the expected number of open gates is `count`, above 0 and below all."""
    low, high = -100.0 - float(log_alpha.max()), 100.0 - float(log_alpha.min())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(open_probability(log_alpha + middle).sum()) > count else (middle, high)
    return log_alpha + high


def units_of(gradients: Iterable[Tensor], units: int) -> Tensor:
    """The gradient by each unit: (U,), from those by all channels of each of its gates."""
    return torch.stack([gradient.view(units, -1).sum(-1) for gradient in gradients]).sum(0)
