"""The range test on quadratics, whose stability limit is known: 2 (1 + momentum) / largest curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from ds_train.schedule.range_test import (
    UnstableError,
    diverged,
    exponential,
    find_learning_rate,
    judge,
    smooth,
    steepest_rate,
)

SPECTRA = {
    "one": [4.0],
    "few": [1.0, 2.0, 3.0, 10.0],
    "spike": [100.0] + [1.0] * 50,
    "wide": np.logspace(-3, 2, 30).tolist(),
}


def quadratic(curvatures: list[float], momentum: float, noise: float) -> Callable[[Sequence[float]], Iterator[float]]:
    """Gradient descent on sum(curvature * weight**2) / 2 from weights of 1."""
    curvature = np.array(curvatures)

    def train(rates: Sequence[float]) -> Iterator[float]:
        weights, velocity = np.ones_like(curvature), np.zeros_like(curvature)
        random = np.random.default_rng(0)
        for rate in rates:
            yield float((curvature * weights**2).sum() / 2)
            gradient = curvature * weights + noise * random.standard_normal(len(weights))
            velocity = momentum * velocity + gradient
            weights = weights - rate * velocity

    return train


@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_value_is_within_a_factor_of_1_5_below_the_stability_limit(
    spectrum: str, momentum: float, noise: float
) -> None:
    curvatures = SPECTRA[spectrum]
    limit = 2 * (1 + momentum) / max(curvatures)
    found = find_learning_rate(quadratic(curvatures, momentum, noise), 1e-6, 100.0, 100, 50, 1.25)
    assert limit / 1.5 <= found.value <= limit
    assert not found.bounded
    assert f"training is stable at {found.largest_stable:.3g} and not at" in found.reasoning
    assert found.steepest is not None
    assert found.steepest < limit


def adam(curvatures: list[float]) -> Callable[[Sequence[float]], Iterator[float]]:
    """Adam, beta 0.9 and 0.95, on the quadratic from weights of 1, with noisy gradients."""
    curvature = np.array(curvatures)

    def train(rates: Sequence[float]) -> Iterator[float]:
        weights, first, second = np.ones_like(curvature), np.zeros_like(curvature), np.zeros_like(curvature)
        random = np.random.default_rng(1)
        for step, rate in enumerate(rates, start=1):
            yield float((curvature * weights**2).sum() / 2)
            gradient = curvature * weights + 0.05 * random.standard_normal(len(weights))
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            weights = weights - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)

    return train


def test_without_a_sharp_limit_the_run_that_ends_lowest_counts() -> None:
    train = adam(SPECTRA["wide"])
    found = find_learning_rate(train, 1e-6, 100.0, 100, 50, 1.25, sharp=False)
    ends = {probe.rate: probe.end for probe in found.probes if probe.stable}
    assert found.value == min(ends, key=ends.__getitem__)
    grid = [float(rate) for rate in np.logspace(-5, 0, 41)]
    best = min(grid, key=lambda rate: np.mean(list(train([rate] * 50))[-8:]))
    assert best / 2.5 <= found.value <= best * 2.5
    assert "ended with the lowest loss" in found.reasoning


def test_a_range_that_is_stable_to_its_end_says_so() -> None:
    found = find_learning_rate(quadratic([1.0], 0.0, 0.0), 1e-6, 0.1, 100, 50, 2.0)
    assert (found.bounded, found.largest_stable, found.value) == (True, 0.1, 0.05)
    assert "the end of the range" in found.reasoning


def test_training_that_is_unstable_everywhere_is_an_error() -> None:
    with pytest.raises(UnstableError, match="unstable at the lowest learning rate, 100"):
        find_learning_rate(quadratic([1.0], 0.0, 0.0), 100.0, 1e4, 50, 30, 1.25)


def test_the_sweep_stops_where_it_diverges() -> None:
    found = find_learning_rate(quadratic([1.0], 0.0, 0.0), 1e-6, 1e6, 200, 50, 1.25)
    assert len(found.losses) < 200
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert diverged(found.smoothed)
    assert not diverged(found.smoothed[:-1])
    assert diverged([3.0, math.nan])


def test_the_parts_are_their_formulas() -> None:
    rates = exponential(1e-4, 1.0, 5)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    losses = [5.0, 4.0, 6.0]
    weights = [[1.0], [0.9, 1.0], [0.81, 0.9, 1.0]]
    expected = [np.average(losses[: len(row)], weights=row) for row in weights]
    assert smooth(losses) == pytest.approx(expected)
    assert steepest_rate(rates, [5.0, 4.8, 3.0, 2.9, 4.0]) == pytest.approx(1e-3)
    assert steepest_rate(rates, [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert judge(0.1, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]).stable
    assert not judge(0.1, [4.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0]).stable
    assert not judge(0.1, [4.0, math.inf]).stable
