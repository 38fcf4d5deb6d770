"""CPU ranks of a host with several NUMA nodes stay on cores of their own, whose memory is near."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

CpuSet = frozenset[int]
"""Logical processors by their number."""

_SYSTEM = Path("/sys/devices/system")


def bind_to_cores(local_rank: int, ranks: int, system: Path = _SYSTEM) -> CpuSet | None:
    """Bind this thread, and those that it will start, to its share of the host; None where nothing was bound.

    Memory follows, since Linux gives a page from the node of the thread that writes it first. Left alone are hosts with
    one node, and ranks that somebody has placed already (numactl, a scheduler, a container): what they may use isn't
    all processors of several nodes. `system` is Linux's /sys/devices/system.
    """
    if ranks == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    nodes = numa_nodes(system)
    if len(nodes) < 2 or os.sched_getaffinity(0) != frozenset().union(*nodes):
        return None
    share = share_of_rank([_physical_cores(node, system) for node in nodes], local_rank, ranks)
    os.sched_setaffinity(0, share)
    return share


def share_of_rank(nodes: Sequence[Sequence[CpuSet]], local_rank: int, ranks: int) -> CpuSet:
    """Processors of one of a host's ranks. `nodes`: of each NUMA node its physical cores, with all their threads.

    Neighbouring ranks, which talk most, share a node; ranks of a node share its cores evenly. With fewer ranks than
    nodes each takes whole neighbouring nodes; more ranks than cores of a node all take all of it.
    """
    if ranks < len(nodes):
        taken = nodes[local_rank * len(nodes) // ranks : (local_rank + 1) * len(nodes) // ranks]
        return frozenset().union(*(core for node in taken for core in node))
    node = local_rank * len(nodes) // ranks
    together = [rank for rank in range(ranks) if rank * len(nodes) // ranks == node]
    cores, place = nodes[node], together.index(local_rank)
    mine = cores[place * len(cores) // len(together) : (place + 1) * len(cores) // len(together)]
    return frozenset().union(*(mine if len(cores) >= len(together) else cores))


def numa_nodes(system: Path = _SYSTEM) -> list[CpuSet]:
    """Online processors of each NUMA node that has any, by the node's number; empty where the system doesn't say."""
    folders = sorted(system.glob("node/node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    nodes = [_cpu_list((folder / "cpulist").read_text()) for folder in folders]
    return [node for node in nodes if node]


def _physical_cores(cpus: CpuSet, system: Path) -> list[CpuSet]:
    """`cpus` by the core that they are threads of."""
    cores = {_siblings(cpu, system) & cpus for cpu in cpus}
    return sorted(cores, key=min)


def _siblings(cpu: int, system: Path) -> CpuSet:
    file = system / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return _cpu_list(file.read_text()) if file.is_file() else frozenset({cpu})


def _cpu_list(text: str) -> CpuSet:
    """Numbers of a list such as 0-3,8,10-11 (linux/Documentation/admin-guide/cputopology.rst)."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)
