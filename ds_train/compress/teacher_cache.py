"""A teacher's likeliest logits at every labelled position of the training samples, on disk and memory-mapped.

CACHE/teacher-<key>/manifest.json         what was asked, and the first sample of each part; written last
CACHE/teacher-<key>/part-*.tokens         int32 (positions, K), samples one after the other
CACHE/teacher-<key>/part-*.logp           float32 (positions, K + 1), the last column is of all other tokens
CACHE/teacher-<key>/part-*.offsets        int64, sample i of the part has positions offsets[i] to offsets[i + 1] - 1
The order of samples is a pure function, so the cache goes by a sample's number and serves every layout. The key is a
hash of all that decides the content.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ds_train.compress.distill_loss import TeacherHead, TopLogits
from ds_train.compress.teacher import KEY, Teacher, teacher_path
from ds_train.config import RunConfig
from ds_train.data.batches import Batches
from ds_train.data.prepare import SHAPE_KEYS
from ds_train.errors import user_error
from ds_train.models.loss import IGNORE_INDEX
from ds_train.models.tasks import SAMPLE_IDS, Batch, on_device

FORMAT = 1
MANIFEST = "manifest.json"
_SEEN_S = 10.0
"""Seconds that a network file system may take to show a new file."""

_PLACE = (1 << 40) - 1
"""What of a sample's id is its place along the run (data/batches.py)."""


class TeacherCache:
    """Reads the cache for micro-batches that have `sample_ids`."""

    def __init__(self, folder: Path, batches: Batches) -> None:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._order, self._firsts = batches.order, np.asarray(manifest["firsts"])
        count = manifest["count"]
        self._parts = [_open(folder, number, count) for number in range(len(self._firsts))]

    def targets(self, batch: Batch) -> TopLogits:
        """What the teacher says about the micro-batch, in the order of the flattened labels; nothing where unlabelled.

        Raises:
            RuntimeError: the cache has another number of labelled positions for these samples.
        """
        labels_N = batch["labels"].reshape(-1)
        samples = self._order.index(batch[SAMPLE_IDS].cpu().numpy() & _PLACE)
        found = [self._sample(int(sample)) for sample in samples]
        tokens, logp = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
        (places,) = torch.nonzero(labels_N != IGNORE_INDEX, as_tuple=True)
        if len(places) != len(tokens):
            raise RuntimeError(f"the teacher's cache has {len(tokens)} labels for these samples, not {len(places)}")
        tokens_NK = torch.zeros(len(labels_N), tokens.shape[1], dtype=torch.int64, device=labels_N.device)
        logp_NE = torch.zeros(len(labels_N), logp.shape[1], device=labels_N.device)
        tokens_NK[places], logp_NE[places] = tokens.to(tokens_NK), logp.to(logp_NE)
        return TopLogits(tokens_NK, logp_NE)

    def _sample(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        part = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        tokens, logp, offsets = self._parts[part]
        start, stop = offsets[sample - self._firsts[part] :][:2]
        return tokens[start:stop], logp[start:stop]


def cached_teacher(
    run: RunConfig, batches: Batches, manifest: Mapping[str, Any], device: Any, micro_samples: int, classes: int
) -> TeacherCache:
    """The recipe's cache, made now if it isn't there yet. Collective: all ranks share the work, each with a whole
    teacher.

    Args:
        manifest: of the prepared data.
        classes: entries of the teacher's logits.
    """
    count = min(run.compress.distill.cache_top, classes)
    cache = Path(run.data.cache_dir).expanduser()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        folder = cache / f"teacher-{_key(run, count, str(manifest['content']))}"
        # Other runs may fill the same cache now.
        box[0] = folder, (folder / MANIFEST).is_file(), uuid.uuid4().hex[:8]
    dist.broadcast_object_list(box, src=0)
    folder, there, own = box[0]
    _check_seen(cache, f"{folder.name}-{own}")
    if not there:
        _make(folder, own, Teacher(run, device), run, batches, device, micro_samples, count)
    return TeacherCache(folder, batches)


def _check_seen(cache: Path, name: str) -> None:
    """Refuse a folder in which ranks of other hosts don't see what rank 0 writes. Collective.

    Raises:
        UserError: on every rank, with the hosts that don't.
    """
    mark = cache / f"{name}.seen"
    if dist.get_rank() == 0:
        cache.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    until = time.monotonic() + _SEEN_S
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.1)
    blind: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if mark.exists() else socket.gethostname())
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        reason = f"all ranks fill the teacher's cache there, and {', '.join(hosts)} doesn't see what rank 0 writes"
        fix = "choose a folder that all hosts share, or set compress.distill.cache_top=0"
        raise user_error("data.cache_dir", reason, fix, str(cache))


def _make(
    folder: Path,
    own: str,
    teacher: Teacher,
    run: RunConfig,
    batches: Batches,
    device: Any,
    micro_samples: int,
    count: int,
) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    partial = folder.with_name(f"{folder.name}.{own}.partial")
    if rank == 0:
        partial.mkdir(parents=True)
    dist.barrier()
    firsts = [batches.num_samples * number // ranks for number in range(ranks + 1)]
    counts: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    temperature = run.compress.distill.temperature
    place = partial / f"part-{rank:05d}"
    with place.with_suffix(".tokens").open("wb") as tokens, place.with_suffix(".logp").open("wb") as logp:
        # All ranks run a teacher that is in shares as often as the one with the most samples.
        most = max(stop - first for first, stop in itertools.pairwise(firsts))
        for start in range(firsts[rank], firsts[rank] + most, micro_samples):
            samples = range(start, min(start + micro_samples, firsts[rank + 1]))
            shown = samples or range(1)
            batch = on_device(batches.of_samples(shown), torch.device(device))
            top = _likeliest(teacher, batch, count, temperature)
            if not samples:
                continue
            tokens.write(top.tokens_NK.to("cpu", torch.int32).numpy().tobytes())
            logp.write(top.logp_NE.float().cpu().numpy().tobytes())
            counts.append(batches.label_counts(samples))
    np.cumsum(np.concatenate(counts)).tofile(place.with_suffix(".offsets"))
    dist.barrier()
    if rank == 0:
        words = {"format": FORMAT, "count": count, "firsts": firsts[:-1], "teacher": teacher_path(run)}
        (partial / MANIFEST).write_text(json.dumps(words), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
            shutil.rmtree(partial)  # another run was first, with the same
    dist.barrier()


def _likeliest(teacher: Teacher, batch: Batch, count: int, temperature: float) -> TopLogits:
    """Of the labelled positions of a micro-batch."""
    targets = teacher.targets(batch)
    assert not isinstance(targets, TopLogits)
    (places,) = torch.nonzero(batch["labels"].reshape(-1) != IGNORE_INDEX, as_tuple=True)
    if isinstance(targets, TeacherHead):
        targets = TeacherHead(targets.hidden_ND[places], targets.weight_VD, targets.bias_V)
        places = torch.arange(len(places), device=places.device)
    rows = 1024  # whose logits are held at once
    tops = [
        TopLogits.of(_logits(targets, places[start : start + rows]), count, temperature)
        for start in range(0, max(1, len(places)), rows)
    ]
    found = TopLogits(torch.cat([top.tokens_NK for top in tops]), torch.cat([top.logp_NE for top in tops]))
    if not bool(found.logp_NE.isfinite().all()):
        reason = "it gives logits that aren't finite numbers for some of the training samples"
        raise user_error(KEY, reason, "give another teacher, or compress.distill.dtype=fp32 if that is what it needs")
    return found


def _logits(targets: Any, places: Tensor) -> Tensor:
    return targets.logits(places, None, 0)


def _open(folder: Path, number: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
    place = folder / f"part-{number:05d}"
    offsets = np.fromfile(place.with_suffix(".offsets"), np.int64)
    if offsets[-1] == 0:
        return np.empty((0, count), np.int32), np.empty((0, count + 1), np.float32), offsets
    tokens = np.memmap(place.with_suffix(".tokens"), np.int32, "r").reshape(-1, count)
    return tokens, np.memmap(place.with_suffix(".logp"), np.float32, "r").reshape(-1, count + 1), offsets


def _key(run: RunConfig, count: int, content: str) -> str:
    section, folder = run.compress.distill, Path(teacher_path(run)).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    # By name, size and time: the weights of a large teacher take minutes to hash.
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    data = {name: getattr(run.data, name) for name in (*SHAPE_KEYS, "sequence_length")}
    asked = [
        FORMAT, str(folder), run.model.revision, weights, content, data, run.task.kind, section.temperature, count,
        section.dtype if section.dtype != "auto" else run.precision.dtype,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:20]
