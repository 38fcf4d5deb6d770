"""The allocator that keeps freed blocks: what it reuses, and that the process is never larger than it had to be."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable

import pytest
import torch
from ds_kernels.memory import MemoryCounts, hand_back_memory, memory_counts, memory_library, reuse_memory

MB = 2**20

pytestmark = pytest.mark.skipif(
    isinstance(memory_library(), Exception), reason="no Linux, or no compiler, on this machine"
)


def in_a_process(check: Callable[[], None]) -> None:
    """An allocator stays as long as its process; and OpenMP's threads don't come along into a fork of this one."""
    process = multiprocessing.get_context("forkserver").Process(target=_with_allocator, args=(check,))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    assert process.exitcode == 0


def _with_allocator(check: Callable[[], None]) -> None:
    assert reuse_memory() is None
    check()


def block(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def _freed_pages_serve_again_and_idle_ones_go_before_the_process_grows() -> None:
    most = block(16 * MB)
    del most
    # 16 MB were most in use at once, and a sixteenth less is kept.
    first, second, third = block(5 * MB), block(2 * MB), block(8 * MB)
    place = first.data_ptr()
    small = torch.zeros(1000)
    assert memory_counts() == MemoryCounts(live=15 * MB, idle=0, most_live=16 * MB, fresh=16 * MB)
    del first, small
    assert (memory_counts().live, memory_counts().idle) == (10 * MB, 5 * MB)
    half = block(2 * MB - 5000, 1)
    assert half.data_ptr() == place
    del second
    # What is left of the first one, and the second beside it.
    joined = block(4 * MB, 2)
    assert memory_counts().fresh == 16 * MB
    assert (int(half.min()), int(half.max())) == (1, 1)
    assert (int(joined.min()), int(joined.max())) == (2, 2)
    # No piece has room for it.
    del half
    numbers = torch.arange(3 * MB // 8)
    assert memory_counts() == MemoryCounts(live=15 * MB, idle=0, most_live=16 * MB, fresh=19 * MB)
    assert int(numbers.sum()) == len(numbers) * (len(numbers) - 1) // 2
    assert int(third.max()) == 0
    del joined
    hand_back_memory()
    assert memory_counts() == MemoryCounts(live=11 * MB, idle=0, most_live=11 * MB, fresh=19 * MB)
    storage = numbers.untyped_storage()
    storage.resize_(16 * MB)
    assert storage.nbytes() == 16 * MB
    assert storage[8] == 1


def test_freed_pages_serve_again_and_idle_ones_go_before_the_process_grows() -> None:
    in_a_process(_freed_pages_serve_again_and_idle_ones_go_before_the_process_grows)


def _a_step_that_is_repeated_takes_little_of_the_system() -> None:
    torch.manual_seed(0)
    sizes = [int(size) for size in torch.randint(1, 9 * MB, (40,))]
    for step in range(4):
        before = memory_counts().fresh
        kept = []
        for index, size in enumerate(sizes):
            temporary = block(size // 2 + MB, index)
            kept.append(block(size, index))
            del temporary
        for index in reversed(range(len(kept))):
            tensor = kept.pop()
            assert int(tensor[-1]) == int(tensor[0]) == index
            temporary = block(MB + tensor.numel() // 3)
            del tensor
        temporary = block(100 * MB)
        del temporary
        taken = sum(sizes) * (1 + 1 / 2 + 1 / 3) + (2 * len(sizes) + 100) * MB
        assert step == 0 or memory_counts().fresh - before < 0.3 * taken


def test_a_step_that_is_repeated_takes_little_of_the_system() -> None:
    in_a_process(_a_step_that_is_repeated_takes_little_of_the_system)


def _other_threads_and_the_profiler_see_it() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(50):
            mine = block(MB + 4096 * (turn % 5) * seed, seed)
            if not int(mine.min()) == int(mine.max()) == seed:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory_counts().live == 0
    assert memory_counts().idle <= memory_counts().most_live
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = block(3 * MB)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) == 3 * MB
    assert kept[0] == 0


def test_other_threads_and_the_profiler_see_it() -> None:
    in_a_process(_other_threads_and_the_profiler_see_it)


def _products_that_free_by_the_address_alone_work() -> None:
    torch.set_num_threads(1)
    left, right = torch.randn(700, 900).bfloat16(), torch.randn(900, 800).bfloat16()
    wide = left.double() @ right.double()
    for _ in range(3):
        assert ((left @ right).double() - wide).abs().max() < 0.01 * wide.abs().max()
    assert torch.empty(0).numel() == 0


def test_products_that_free_by_the_address_alone_work() -> None:
    in_a_process(_products_that_free_by_the_address_alone_work)


def _a_request_that_cannot_be_met_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_request_that_cannot_be_met_is_torchs_error() -> None:
    in_a_process(_a_request_that_cannot_be_met_is_torchs_error)


def _a_fork_has_nobody_elses_lock() -> None:
    torch.set_num_threads(1)
    # torch looks an operator up at its first use, under a lock that isn't freed in a fork.
    block(MB)
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            block(MB)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(50):
        child = os.fork()
        if child == 0:
            block(MB)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    ended.set()
    thread.join()


def test_a_fork_has_nobody_elses_lock() -> None:
    in_a_process(_a_fork_has_nobody_elses_lock)
