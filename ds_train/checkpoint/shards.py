"""Fragments in files: written as safetensors without a copy in memory, read back as any run of any shard.

A rank's file holds a tensor `KIND:NAME` for each kind of each fragment; its metadata says where the elements belong.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ds_train.checkpoint.fragments import WEIGHT, Fragment, Shape
from ds_train.checkpoint.manifest import Written
from ds_train.parallel.tensor import Shard

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK_BYTES = 16 * 2**20


def write_fragments(path: Path, batch: Sequence[Fragment]) -> Written:
    """Write a batch of fragments to `path`, hashed on the way, and make sure that it is on the disk."""
    places = {
        fragment.name: {"shape": asdict(fragment.shape), "shard": fragment.shard, "start": fragment.start}
        for fragment in batch
    }
    tensors = [(f"{kind}:{item.name}", tensor) for item in batch for kind, tensor in item.tensors.items()]
    return write_safetensors(path, tensors, {"fragments": json.dumps(places)})


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: dict[str, str]) -> Written:
    """Write named tensors, views of anything on any device, one after the other.

    The library's own writer wants all of them on the host, none of them a view of another's memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK_BYTES):
                put(data[start : start + _CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
        return Written(path.name, file.tell(), digest.hexdigest())


class FragmentFiles:
    """The whole model's weights and states in the fragments of all ranks' files; a `Source`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files and read their metadata.

        Raises:
            ValueError: elements of a parameter are in no file.
        """
        self._stack = ExitStack()
        self._runs: dict[str, list[tuple[int, int, int, Any]]] = {}
        self.shapes: dict[str, Shape] = {}
        """How each parameter was cut where it was saved, by name."""
        self.kinds: dict[str, torch.dtype] = {}
        """Number format of each of the optimizer's states."""
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._add(file)
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[:2])
        self._check_coverage()

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()

    def read(self, name: str, kind: str, shape: Shape, shard: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` - 1 of a shard of `shape`, flattened. In memory are at most the whole tensor and
        its shards, and no more than the asked elements where the parameter was saved with the same cut.

        Raises:
            KeyError: there is no such parameter or state.
            ValueError: the parameter was saved with another size.
        """
        saved = self.shapes[name]
        if saved.whole != shape.whole:
            raise ValueError(f"{name} was saved with the shape {saved.whole} and has {shape.whole} here")
        if (saved.cut, saved.shards) == (shape.cut, shape.shards):
            return self._elements(name, kind, shard, start, stop)
        whole = self.whole(name, kind)
        if shape.cut is not None:
            whole = shape.cut.cut(whole, shard, shape.shards)
        return whole.reshape(-1)[start:stop]

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole parameter, or a state of all of its elements."""
        shape = self.shapes[name]
        size = shape.of_shard()
        numel = torch.Size(size).numel()
        shards = [self._elements(name, kind, shard, 0, numel).view(size) for shard in range(shape.shards)]
        return shards[0] if shape.cut is None else shape.cut.join(shards)

    def _add(self, file: Any) -> None:
        names = set(file.keys())
        for name, record in json.loads(file.metadata()["fragments"]).items():
            cut = record["shape"]["cut"]
            shape = Shape(
                tuple(record["shape"]["whole"]), None if cut is None else Shard(**cut), record["shape"]["shards"]
            )
            self.shapes[name] = shape
            numel = file.get_slice(f"{WEIGHT}:{name}").get_shape()[0]
            run = (record["shard"], record["start"], record["start"] + numel, file)
            self._runs.setdefault(name, []).append(run)
        for key in names:
            kind = key.partition(":")[0]
            if kind != WEIGHT and kind not in self.kinds:
                self.kinds[kind] = file.get_slice(key)[0:0].dtype

    def _elements(self, name: str, kind: str, shard: int, start: int, stop: int) -> Tensor:
        parts = [
            file.get_slice(f"{kind}:{name}")[max(start, first) - first : min(stop, last) - first]
            for number, first, last, file in self._runs[name]
            if number == shard and first < stop and start < last
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_coverage(self) -> None:
        for name, runs in self._runs.items():
            shape = self.shapes[name]
            numel = torch.Size(shape.of_shard()).numel()
            for shard in range(shape.shards):
                end = 0
                for _, first, last, _ in (run for run in runs if run[0] == shard):
                    if first != end:
                        break
                    end = last
                if end != numel:
                    raise ValueError(f"elements from {end} of shard {shard} of {name} are in no file")
