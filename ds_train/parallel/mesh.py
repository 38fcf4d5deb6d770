"""Process groups of a layout without a pipeline, as the `mpu` object that DeepSpeed asks for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_train.plan.topology import Layout

Group = Any


class Mesh:
    """Groups of this rank along the data, sequence and tensor axes. Collective: every rank builds it.

    The method names are those that DeepSpeed looks for (utils/groups.py, utils/bwc.py). ZeRO shards and averages over
    data and sequence ranks together; norms are summed over tensor ranks.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        places = [layout.coordinates(other) for other in range(layout.ranks)]
        here = places[rank]

        def group(*axes: str) -> Group:
            """The ranks that differ from this one along `axes` only."""
            fixed = [axis for axis in here._fields if axis not in axes]
            members: dict[tuple[int, ...], list[int]] = {}
            for other, place in enumerate(places):
                members.setdefault(tuple(getattr(place, axis) for axis in fixed), []).append(other)
            mine = None
            for ranks in members.values():
                created = dist.new_group(ranks)
                mine = created if rank in ranks else mine
            return mine

        self._data, self._tensor, self._sequence = group("data"), group("tensor"), group("sequence")
        self._sharding = group("data", "sequence") if layout.sequence > 1 else self._data

    def get_data_parallel_group(self) -> Group:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_sequence_data_parallel_group(self) -> Group:
        return self._sharding

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sharding)

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._sharding)

    def get_sequence_parallel_group(self) -> Group:
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sequence)

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence)

    def get_model_parallel_group(self) -> Group:
        return self._tensor

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    get_tensor_model_parallel_rank = get_model_parallel_rank
