"""Facts that ranks have in common: who differs is named, and a checksum sees every bit and its place."""

from __future__ import annotations

import pytest
import torch

from ds_train.engine.contract import checksum, odd_ones


def test_the_fewer_ranks_are_the_odd_ones() -> None:
    everyones = [{"host": f"h{rank}", "torch": "2.13.0" if rank != 2 else "2.12.0", "code": "a"} for rank in range(4)]
    (problem,) = odd_ones(everyones)
    assert str(problem) == (
        "ranks: torch of rank 2 on h2 isn't that of the other ranks: 2.12.0 instead of 2.13.0. "
        "Fix: install the same versions everywhere."
    )


def test_facts_of_some_ranks_are_compared_among_them() -> None:
    everyones = [
        {"host": "a", "w (tensor 0)": "1"},
        {"host": "b", "w (tensor 1)": "2"},
        {"host": "c", "w (tensor 0)": "1"},
    ]
    assert odd_ones(everyones) == []
    everyones[2]["w (tensor 0)"] = "3"
    (problem,) = odd_ones(everyones, "the parameter ")
    assert "the parameter w (tensor 0) of rank 2 on c" in str(problem)


def test_long_values_are_not_shown() -> None:
    everyones = [{"host": "a", "code": "0" * 64}, {"host": "b", "code": "1" * 64}]
    assert "000" not in str(odd_ones(everyones)[0])
    assert "give every host the same ds_train" in str(odd_ones(everyones)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_checksum_sees_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(-5, 8).to(dtype).view(1, 13)
    whole = int(checksum(tensor))
    for place in range(13):
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert int(checksum(other)) != whole


def test_a_checksum_sees_an_exchange() -> None:
    tensor = torch.randn(3 * 2**20 + 5)
    whole = int(checksum(tensor))
    assert int(checksum(tensor.clone())) == whole
    for one, other in ((0, 1), (0, 2**20), (2**20 + 3, 3 * 2**20 + 3)):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        assert int(checksum(swapped)) != whole


def test_an_empty_tensor_has_one_too() -> None:
    assert int(checksum(torch.empty(0))) == 0
