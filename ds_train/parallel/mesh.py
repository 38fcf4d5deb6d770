"""Process groups of a layout, as the `mpu` object that DeepSpeed asks for them where there is no pipeline."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_train.plan.topology import Layout

Group = Any


def leave_groups() -> None:
    """Destroy every process group but that of all ranks. Collective; no engine of this process may be used after it.

    DeepSpeed makes the next engine's anew and keeps the last one's, each with its sockets and threads.
    """
    import deepspeed

    dist.barrier()  # nobody is in a collective of theirs any more
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            deepspeed.comm.destroy_process_group(group)
    deepspeed.utils.groups.mpu = None


class Mesh:
    """Groups of this rank along the axes. Collective: every rank builds it.

    The method names are those that DeepSpeed looks for (utils/groups.py, utils/bwc.py). It takes sequence ranks for
    data ranks: ZeRO shards and averages over both together. Told of them, its stage 3 divides gradients by another
    number of ranks in one path (coalesced_collectives.py:124) than in the other (stage3.py:1878). Norms are summed
    over tensor ranks.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout = layout
        self._rank = rank
        self.place = layout.coordinates(rank)
        """Coordinates of this rank."""
        self._tensor = self._sequence = self._sharding = None
        if layout.tensor * layout.sequence > 1:
            self._tensor, self._sharding = self.group("tensor"), self.group("data", "sequence")
        if layout.sequence > 1:  # else each rank would be a group, and all ranks take part in making every one
            self._sequence = self.group("sequence")

    def group(self, *axes: str) -> Group:
        """A new group of the ranks that differ from this one along `axes` only. Collective."""
        fixed = [axis for axis in self.place._fields if axis not in axes]
        members: dict[tuple[int, ...], list[int]] = {}
        for other in range(self.layout.ranks):
            place = self.layout.coordinates(other)
            members.setdefault(tuple(getattr(place, axis) for axis in fixed), []).append(other)
        mine = None
        for ranks in members.values():
            created = dist.new_group(ranks)
            mine = created if self._rank in ranks else mine
        return mine

    @property
    def tensor(self) -> Group:
        """The ranks that hold the shards of one copy of a layer; None without tensor and sequence ranks."""
        return self._tensor

    @property
    def sequence(self) -> Group:
        """The ranks that share the tokens of a sample; None without sequence ranks."""
        return self._sequence

    def get_data_parallel_group(self) -> Group:
        return self._sharding

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sharding)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._sharding)

    def get_model_parallel_group(self) -> Group:
        return self._tensor

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    get_tensor_model_parallel_rank = get_model_parallel_rank
