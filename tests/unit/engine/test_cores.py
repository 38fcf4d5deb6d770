"""Cores of CPU ranks: of a host that a folder describes as Linux describes its own."""

import os
from pathlib import Path

import pytest

from ds_train.engine.cores import bind_to_cores, numa_nodes, share_of_rank


def host(folder: Path, nodes: list[str], siblings: dict[int, str]) -> Path:
    for number, cpus in enumerate(nodes):
        (folder / "node" / f"node{number}").mkdir(parents=True)
        (folder / "node" / f"node{number}" / "cpulist").write_text(f"{cpus}\n")
    for cpu, both in siblings.items():
        (folder / "cpu" / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (folder / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{both}\n")
    return folder


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two sockets of four cores with two threads each, numbered as Linux does, and a node of memory alone."""
    siblings = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    return host(tmp_path, ["0-3,8-11", "4-7,12-15", ""], siblings)


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    masks = {0: set(range(16))}
    monkeypatch.setattr(os, "sched_getaffinity", masks.get)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: masks.update({pid: set(cpus)}))
    return masks


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (2, [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]),
        (3, [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]),
        (4, [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15}]),
        (8, [{core, core + 8} for core in range(8)]),
    ],
)
def test_ranks_share_nodes_by_whole_cores(
    two_sockets: Path, affinity: dict[int, set[int]], ranks: int, expected: list[set[int]]
) -> None:
    found = []
    for rank in range(ranks):
        affinity[0] = set(range(16))
        assert bind_to_cores(rank, ranks, two_sockets) == affinity[0]
        found.append(affinity[0])
    assert found == expected


def test_more_ranks_than_cores_take_all_of_a_node() -> None:
    nodes = [[frozenset({0}), frozenset({1})], [frozenset({2}), frozenset({3})]]
    assert [share_of_rank(nodes, rank, 6) for rank in range(6)] == [{0, 1}] * 3 + [{2, 3}] * 3


def test_fewer_ranks_than_nodes_take_whole_ones() -> None:
    nodes = [[frozenset({node})] for node in range(8)]
    assert [share_of_rank(nodes, rank, 3) for rank in range(3)] == [{0, 1}, {2, 3, 4}, {5, 6, 7}]


@pytest.mark.parametrize("allowed", [set(range(8)), {0, 1, 2, 3, 8, 9, 10, 11}, set(range(15))])
def test_ranks_that_were_placed_stay(two_sockets: Path, affinity: dict[int, set[int]], allowed: set[int]) -> None:
    affinity[0] = allowed
    assert bind_to_cores(1, 2, two_sockets) is None
    assert affinity[0] == allowed


def test_nothing_to_choose(two_sockets: Path, tmp_path: Path, affinity: dict[int, set[int]]) -> None:
    assert bind_to_cores(0, 1, two_sockets) is None
    assert bind_to_cores(1, 2, host(tmp_path / "one", ["0-15"], {})) is None
    assert bind_to_cores(1, 2, tmp_path / "no such system") is None
    assert affinity[0] == set(range(16))


@pytest.mark.skipif(not Path("/sys/devices/system/node").is_dir(), reason="this system doesn't say its nodes")
def test_this_machine() -> None:
    assert os.sched_getaffinity(0) <= frozenset().union(*numa_nodes())
