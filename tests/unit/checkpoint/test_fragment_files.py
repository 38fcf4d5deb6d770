"""Fragments of any layout give the elements of any other one, as cutting the whole tensor does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ds_train.checkpoint.fragments import WEIGHT, Fragment, Shape
from ds_train.checkpoint.manifest import sha256
from ds_train.checkpoint.shards import FragmentFiles, write_fragments, write_safetensors
from ds_train.parallel.tensor import Shard

CUTS = {
    "whole": (None, 1),
    "rows over 2": (Shard(0), 2),
    "rows over 4": (Shard(0), 4),
    "columns over 2": (Shard(1), 2),
    "three matrices over 2": (Shard(0, 3), 2),
    "three matrices over 4": (Shard(0, 3), 4),
}


def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        WEIGHT: torch.randn(12, 6, generator=generator),
        "exp_avg": torch.randn(12, 6, generator=generator).bfloat16(),
    }


def write(folder: Path, cut: Shard | None, shards: int, runs: int) -> FragmentFiles:
    """Every shard in `runs` runs of elements, a file each."""
    shape = Shape((12, 6), cut, shards)
    paths = []
    for shard in range(shards):
        own = {kind: whole if cut is None else cut.cut(whole, shard, shards) for kind, whole in states().items()}
        numel = own[WEIGHT].numel()
        bounds = [numel * run // runs for run in range(runs + 1)]
        for start, stop in pairwise(bounds):
            tensors = {kind: value.reshape(-1)[start:stop] for kind, value in own.items()}
            paths.append(folder / f"{shard}-{start}.safetensors")
            write_fragments(paths[-1], [Fragment("w", shape, shard, start, tensors)])
    return FragmentFiles(paths)


@pytest.mark.parametrize("runs", [1, 5])
@pytest.mark.parametrize("saved", CUTS)
def test_any_cut_is_read_as_any_other(tmp_path: Path, saved: str, runs: int) -> None:
    files = write(tmp_path, *CUTS[saved], runs)
    for kind, whole in states().items():
        assert torch.equal(files.whole("w", kind), whole)
        for cut, shards in CUTS.values():
            for shard in range(shards):
                expected = (whole if cut is None else cut.cut(whole, shard, shards)).reshape(-1)
                for start, stop in ((0, len(expected)), (3, 11), (len(expected) - 1, len(expected))):
                    read = files.read("w", kind, Shape((12, 6), cut, shards), shard, start, stop)
                    assert torch.equal(read, expected[start:stop])
                    assert read.dtype == expected.dtype
    assert files.kinds == {"exp_avg": torch.bfloat16}
    files.close()


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"view": base[:, 1:3], "scalar": torch.tensor(3), "empty": base[:0], "half": base.half().t()}
    written = write_safetensors(tmp_path / "a.safetensors", list(tensors.items()), {"about": "views"})
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    path = tmp_path / "a.safetensors"
    assert (written.bytes, written.sha256) == (path.stat().st_size, sha256(path))


def test_a_missing_run_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, Shard(0), 2, 3).close()
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="elements from 12 of shard 1 of w are in no file"):
        FragmentFiles(path for path in paths if path.name != "1-12.safetensors")
