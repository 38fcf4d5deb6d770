"""Where ZeRO 1 and 2 keep the elements of a parameter, whatever the order and the gaps of their flat buffer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_train.checkpoint.fragments import _partitioned_places


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_element_has_one_place(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.randn(size)) for size in ((3,), (2, 4), (5,), (1,))]
    # In another order than the model's, each begins at a multiple of 4.
    order, offsets, flat = [2, 0, 3, 1], [0, 8, 12, 16], torch.full((24,), torch.nan)
    for number, offset in zip(order, offsets, strict=True):
        flat[offset : offset + parameters[number].numel()] = parameters[number].detach().flatten()
    size = len(flat) // ranks
    seen = {id(parameter): torch.full((parameter.numel(),), torch.nan) for parameter in parameters}
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        master = flat[rank * size : (rank + 1) * size]
        zero = SimpleNamespace(
            single_partition_of_fp32_groups=[master], real_dp_process_group=[None], partition_size=[size],
            bit16_groups=[parameters], round_robin_bit16_groups=[[parameters[number] for number in order]],
            round_robin_bit16_offsets=[offsets],
        )  # fmt: skip
        for place in _partitioned_places(zero):
            own = seen[id(place.parameter)][place.start : place.start + place.numel]
            assert own.isnan().all()
            own.copy_(place.master[place.offset : place.offset + place.numel])
    for parameter in parameters:
        torch.testing.assert_close(seen[id(parameter)], parameter.detach().flatten(), rtol=0, atol=0)
