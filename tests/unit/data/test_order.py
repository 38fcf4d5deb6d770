"""The order of samples: permutations, pinned for ever."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from ds_train.data.order import Order


@pytest.mark.parametrize("number", [*range(1, 40), 255, 256, 257, 1000, 4095, 65537])
def test_each_epoch_holds_each_sample_once(number: int) -> None:
    order = Order(number, seed=11)
    for epoch in (0, 1, 5):
        visited = order.index(np.arange(epoch * number, (epoch + 1) * number))
        assert np.array_equal(np.sort(visited), np.arange(number))


def test_one_place_is_asked_for_as_well_as_many() -> None:
    order = Order(37, seed=2)
    many = order.index(np.arange(200).reshape(20, 10))
    assert many.shape == (20, 10)
    assert many.dtype == np.int64
    assert [int(order.index(place)) for place in range(200)] == many.ravel().tolist()


def test_the_order_is_pinned() -> None:
    assert Order(10, 1).index(np.arange(12)).tolist() == [3, 4, 9, 7, 1, 6, 2, 0, 8, 5, 7, 3]
    assert Order(3, 2**31 - 1).index(np.arange(9)).tolist() == [2, 1, 0, 0, 1, 2, 2, 0, 1]
    assert Order(65537, 7).index(np.array([0, 1, 65537, 10**9])).tolist() == [33366, 48940, 48022, 56631]
    assert int(Order(5, 0).index(12)) == 3


def test_the_largest_places_are_still_inside() -> None:
    number = 2**40 + 7
    visited = Order(number, seed=3).index(np.arange(5 * number - 1000, 5 * number))
    assert len(set(visited.tolist())) == 1000
    assert 0 <= visited.min() < visited.max() < number


def test_all_permutations_of_few_samples_come_up() -> None:
    order = Order(4, seed=9)
    epochs = order.index(np.arange(4 * 4800)).reshape(-1, 4)
    counts = Counter(map(tuple, epochs.tolist()))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert min(counts.values()) > 120, "200 each are expected"


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 1)
