"""The order of samples: a pure function of (seed, position), with no state.

Position p of a run lies in epoch p // n; each epoch visits the n samples in another pseudo-random order. The order is a
keyed Feistel network over the next power of four, walked until it lands inside n (Black & Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002): a permutation that can be asked for any place at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_BLOCK = 2048
"""Neighbouring positions that are computed together: one alone costs nearly as much."""


class Order:
    """Sample index by position, for `num_samples` samples."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        self._half_bits = np.uint64(max(1, (max(1, num_samples - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._block = lru_cache(2)(lambda block: self._compute(np.arange(block * _BLOCK, (block + 1) * _BLOCK)))

    def index(self, position: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices (int64, same shape as `position`) in 0 .. num_samples - 1."""
        positions = np.asarray(position, dtype=np.int64)
        if positions.size:
            block, last = int(positions.min()) // _BLOCK, int(positions.max()) // _BLOCK
            if block == last:
                return self._block(block)[positions - block * _BLOCK]
        return self._compute(positions)

    def _compute(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(positions, self.num_samples)
        with np.errstate(over="ignore"):
            keys = self._keys(epochs.astype(np.uint64))
            current = self._feistel(places.astype(np.uint64), keys)
            outside = current >= self.num_samples
            while outside.any():
                current = np.where(outside, self._feistel(current, keys), current)
                outside = current >= self.num_samples
        return current.astype(np.int64)

    def _keys(self, epoch: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
        base = epoch * np.uint64(_ROUNDS) + (np.uint64(self.seed) << np.uint64(32))
        return [_mix(base + np.uint64(round_number)) for round_number in range(_ROUNDS)]

    def _feistel(self, value: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        left, right = value >> self._half_bits, value & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every input bit changes every output bit. It overflows on purpose."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
