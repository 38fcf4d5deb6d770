"""States and parameters on a disk train as they do in memory, go on from their checkpoints, and leave nothing there."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from plain_loop import (
    STEPS,
    history_of,
    plain_loop,
    train_on_two_ranks,
    write_corpus,
    write_recipe,
    write_weights,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.exhaustive,
    pytest.mark.skipif(not AsyncIOBuilder().is_compatible(), reason="the headers of libaio aren't there"),
]
VOCABULARY = 40_000  # DeepSpeed leaves in memory what is below 1 MiB on a rank
OFFLOADS = {"states": {"offload_optimizer": "nvme"}, "both": {"offload_optimizer": "nvme", "offload_params": "nvme"}}


def test_what_lies_on_a_disk_is_trained_as_in_memory(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama", VOCABULARY)
    disk = tmp_path / "disk"
    disk.mkdir()
    recipes = [
        write_recipe(
            tmp_path, name, corpus, weights, "llama", {"zero_stage": 3, "nvme_path": str(disk), **offload},
            checkpoint={"every_steps": STEPS // 2},
        )
        for name, offload in OFFLOADS.items()
    ]  # fmt: skip
    with seen_on(disk) as kinds:
        train_on_two_ranks(recipes)
    assert kinds == {"states": {"optimizer"}, "both": {"optimizer", "float32params"}}
    assert list(disk.iterdir()) == []
    expected = plain_loop(recipes[0])
    whole = {name: history_of(tmp_path, name) for name in OFFLOADS}
    for name in OFFLOADS:
        np.testing.assert_allclose(whole[name], expected, rtol=1e-5, err_msg=name)
        *_, last = sorted((tmp_path / "runs" / name / "checkpoints").glob("step-*"))
        shutil.rmtree(last)
    train_on_two_ranks(recipes)
    assert {name: history_of(tmp_path, name) for name in OFFLOADS} == whole


@contextmanager
def seen_on(disk: Path) -> Iterator[dict[str, set[str]]]:
    """What kinds of files lie there while the block runs, by the run that they are of."""
    kinds: dict[str, set[str]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for path in disk.glob("*/zero_stage_3/*/rank0/*.swp"):
                run, _, kind, *_ = path.relative_to(disk).parts
                kinds.setdefault(run.rpartition("-")[0], set()).add(kind)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield kinds
    finally:
        over.set()
        thread.join()
