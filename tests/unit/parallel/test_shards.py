"""Shards of parameters: cut and joined they are what they were; look-alikes can be cut as their models can."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from ds_train.models.look_alike import look_alike
from ds_train.parallel.tensor import Shard


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "parts"), [(0, 1), (1, 1), (0, 3), (1, 3)])
def test_joined_shards_are_the_whole(dim: int, parts: int, ranks: int) -> None:
    whole = torch.arange(36 * 36.0).view(36, 36)
    shard = Shard(dim, parts)
    pieces = [shard.cut(whole, rank, ranks) for rank in range(ranks)]
    assert torch.equal(shard.join(pieces), whole)
    assert {piece.numel() for piece in pieces} == {whole.numel() // ranks}


def test_every_rank_has_its_heads_of_each_of_three_matrices_side_by_side() -> None:
    query, key, value = torch.full((4, 2), 1.0), torch.full((4, 2), 2.0), torch.full((4, 2), 3.0)
    second = Shard(0, 3).cut(torch.cat([query, key, value]), 1, 2)
    assert second[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_a_look_alike_can_be_shared_by_the_ranks(ranks: int) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=2304, num_attention_heads=72, num_key_value_heads=24, intermediate_size=4608,
        num_hidden_layers=30, vocab_size=50257,
    )  # fmt: skip
    small = look_alike(config, 4, ranks)
    for size in (small.num_attention_heads, small.num_key_value_heads, small.hidden_size, small.intermediate_size):
        assert size % ranks == 0
    assert small.num_attention_heads == 2 * small.num_key_value_heads
    assert (small.vocab_size % ranks == 0) == (50257 % ranks == 0)
    assert small.num_hidden_layers == 4
