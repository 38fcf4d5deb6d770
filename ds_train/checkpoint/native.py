"""Save and resume: every rank's fragments in files of its own, made whole by a manifest and an atomic rename.

RUN/checkpoints/step-00000100/   one whole checkpoint: rank-*.safetensors, state.json, manifest.json
RUN/checkpoints/*.partial/       a save or a removal that did not end; removed by the next save
RUN/checkpoints/*.old/           what a later save of the same step is about to replace
RUN/checkpoints/latest           name of the newest whole checkpoint, replaced atomically, written last

The files say what each element belongs to, so that any layout reads them (checkpoint/shards.py). What a step depends on
besides is a pure function of (recipe, step): the order of samples, masking, dropout's seeds, the learning rate. So
`state.json` needs one integer, and the rest of it is for checks and for people.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_train.checkpoint.fragments import Fragment, fill, fragments, scalars
from ds_train.checkpoint.manifest import (
    MANIFEST,
    Written,
    damage,
    make_durable,
    read_manifest,
    write_json,
    write_manifest,
    write_text,
)  # fmt: skip
from ds_train.checkpoint.same_run import bad_checkpoint
from ds_train.checkpoint.shards import FragmentFiles, write_fragments
from ds_train.compress.cut import Cut, CutSource
from ds_train.errors import UserError, first_line, user_error
from ds_train.parallel.build import Part

FORMAT = 2
STATE = "state.json"
LATEST = "latest"

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps, and what it was started with.

    `samples` is the place in the data, without what `skips` left out; older checkpoints don't say it. `known` is what
    the engine knows besides tensors (`fragments.scalars`), `pruning` what has been measured, chosen or cut of a model
    that is pruned. `skips` (those of the timeline), `health`
    and `best` are what has been decided on the way, and what the next decisions depend on.
    """

    step: int
    tokens: int
    recipe: dict[str, Any]
    layout: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    wandb_id: str | None = None
    known: dict[str, Any] = field(default_factory=dict)
    skips: list[dict[str, int]] = field(default_factory=list)
    health: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None


@dataclass(frozen=True)
class Saved:
    """How a save ended. `error` says why there is no checkpoint of this step; the older ones are as they were.

    `seconds` went by from its start to its end, and in `stall_seconds` of them no step was trained.
    """

    step: int
    path: Path
    bytes: int
    seconds: float
    stall_seconds: float
    error: str | None


class Saver:
    """Saves checkpoints of one engine under `folder`, on all ranks together.

    Older checkpoints stay untouched until a new one is whole; what can't be written leaves them, and the run, alone.
    """

    def __init__(
        self, folder: Path, engine: Any, part: Part, keep_last: int, keep_every: int | None = None,
        in_background: bool = False,
    ) -> None:  # fmt: skip
        """Collective.

        Args:
            keep_last: newest checkpoints that are kept.
            keep_every: those of every so many steps are kept too.
            in_background: training goes on as soon as the host has a copy of everything.
        """
        self._folder, self._engine, self._part = folder, engine, part
        self._keep_last, self._keep_every = keep_last, keep_every
        # Collectives of the thread that writes never meet those of the thread that trains.
        self._group = dist.new_group(backend="gloo")
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._running: Future[Saved] | None = None
        self._stalled = 0.0

    def save(self, state: TrainState) -> list[Saved]:
        """Save after the current step. Collective. Gives the saves that have ended since the last call."""
        ended = self.wait()
        started = time.monotonic()
        state = replace(state, known=scalars(self._engine))
        batches = fragments(self._engine, self._part)
        if self._pool is None:
            saved = self._write(state, batches, started)
            return [*ended, replace(saved, stall_seconds=saved.seconds)]
        self._running = self._pool.submit(self._write, state, self._copy(batches), started)
        self._stalled = time.monotonic() - started
        return ended

    def wait(self) -> list[Saved]:
        """The save that goes on in the background, after its end; the list is empty where none does."""
        if self._running is None:
            return []
        started = time.monotonic()
        running, self._running = self._running, None
        saved = running.result()
        return [replace(saved, stall_seconds=self._stalled + time.monotonic() - started)]

    def close(self) -> list[Saved]:
        """As `wait`; there is nothing more to save, and no thread stays."""
        ended = self.wait()
        if self._pool is not None:
            self._pool.shutdown()
        return ended

    def ended(self) -> list[Saved]:
        """As `wait`, for a save that has ended already. Each rank by itself."""
        return self.wait() if self._running is not None and self._running.done() else []

    def forget_after(self, step: int) -> str | None:
        """Remove the checkpoints of later steps, which a run that goes on from `step` comes to again. Collective.

        Returns:
            Why they are still there.
        """
        return self._first_error(self._on_main(lambda: self._forget_after(step)))

    def _forget_after(self, step: int) -> None:
        self._remove_leftovers()
        kept = [path for path in _whole(self._folder) if _step(path) <= step]
        if kept:
            write_text(self._folder / LATEST, kept[0].name)
        for path in _checkpoints(self._folder):
            if _step(path) > step:
                _remove(path)

    def _copy(self, batches: Iterable[list[Fragment]]) -> list[list[Fragment]]:
        """The fragments in memory of the host that is kept from one save to the next."""
        copies, devices = [], set()
        for batch in batches:
            devices |= {tensor.device for item in batch for tensor in item.tensors.values()}
            copies.append([replace(item, tensors=self._copies_of(item)) for item in batch])
        for device in devices - {torch.device("cpu")}:
            torch.get_device_module(device).synchronize(device)
        return copies

    def _copies_of(self, fragment: Fragment) -> dict[str, Tensor]:
        for kind, tensor in fragment.tensors.items():
            key = (kind, fragment.name)
            if key not in self._copies:
                self._copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[key].copy_(tensor, non_blocking=True)
        return {kind: self._copies[kind, fragment.name] for kind in fragment.tensors}

    def _write(self, state: TrainState, batches: Iterable[list[Fragment]], started: float) -> Saved:
        final = of_step(self._folder, state.step)
        partial = final.with_name(f"{final.name}.partial")
        files: list[Written] = []
        error = self._first_error(self._on_main(lambda: self._prepare(partial)))
        if error is None:
            error = self._first_error(_attempt(lambda: files.extend(self._write_own(partial, batches))))
        everyones = self._gather(files)
        if error is None:
            written = [file for files in everyones for file in files]
            error = self._first_error(self._on_main(lambda: self._commit(state, partial, final, written)))
        if error is not None:
            self._on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        size = sum(file.bytes for files in everyones for file in files)
        return Saved(state.step, final, size, time.monotonic() - started, 0.0, error)

    def _prepare(self, partial: Path) -> None:
        self._remove_leftovers()
        partial.mkdir(parents=True)

    def _remove_leftovers(self) -> None:
        for leftover in self._folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write_own(self, partial: Path, batches: Iterable[list[Fragment]]) -> Iterable[Written]:
        rank = dist.get_rank()
        return [
            write_fragments(partial / f"rank-{rank:05d}-{number}.safetensors", batch)
            for number, batch in enumerate(batches)
        ]

    def _commit(self, state: TrainState, partial: Path, final: Path, written: Sequence[Written]) -> None:
        write_json(partial / STATE, asdict(state))
        write_manifest(partial, {"format": FORMAT, "step": state.step}, written)
        make_durable(partial)
        old = final.with_name(f"{final.name}.old")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        make_durable(self._folder)
        write_text(self._folder / LATEST, final.name)
        with suppress(OSError):  # the new one is whole, whatever becomes of the older ones
            if old.exists():
                _remove(old)
            self._remove_older(state.step, state.best.get("step"))

    def _remove_older(self, newest: int, best: int | None) -> None:
        # Later ones are damaged, or the run wouldn't have come here: none of them stands for one that is kept.
        whole = [path for path in _whole(self._folder) if _step(path) <= newest]
        first_kept = _step(whole[: self._keep_last][-1])
        for path in _checkpoints(self._folder):
            step = _step(path)
            if step < first_kept and step != best and (self._keep_every is None or step % self._keep_every):
                _remove(path)

    def _on_main(self, work: Callable[[], None]) -> str | None:
        return _attempt(work) if dist.get_rank() == 0 else None

    def _first_error(self, own: str | None) -> str | None:
        """The first rank's error that has one, on every rank."""
        return next((error for error in self._gather(own) if error is not None), None)

    def _gather(self, own: Shared) -> list[Shared]:
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, own, group=self._group)
        return everyones


def find(folder: Path, resume: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None for a fresh start; damaged ones are passed over aloud.

    Collective: each rank reads its share of the files. `note` is rank 0's.

    Raises:
        UserError: a named checkpoint that is not there, not whole, or older than the folder's own; `never` in a folder
            that has checkpoints; `auto` in a folder where every checkpoint is damaged.
    """
    if resume not in ("auto", "never"):
        path = Path(resume).expanduser()
        reason = damage_of(path)
        if reason:
            raise UserError(bad_checkpoint(resume, reason))
        _check_nothing_later(_from_main(_whole(folder)), read_state(path).step, resume)
        return path
    candidates = _from_main(_checkpoints(folder))
    if not candidates:
        return None
    if resume == "never":
        raise user_error(
            "checkpoint.resume",
            f"{folder} already holds checkpoints that this run would replace",
            "set another `name`, or checkpoint.resume=auto to continue them",
            resume,
        )
    newest = newest_whole(folder, note)
    if newest is None:
        reason = f"no complete checkpoint in {folder}"
        raise user_error("checkpoint.resume", reason, "set another `name` to start anew", resume)
    return newest


def _check_nothing_later(own: Sequence[Path], step: int, resume: str) -> None:
    """Refuse to come again to steps of which the run's folder has checkpoints: the next `auto` would take those."""
    later = [path.name for path in own if _step(path) > step]
    if later:
        reason = f"it is of step {step}, and the run's folder has later ones: {', '.join(reversed(later))}"
        fix = "set auto to continue the last of them, or another `name` to leave them alone, or remove them"
        raise user_error("checkpoint.resume", reason, fix, resume)


def newest_whole(folder: Path, note: Callable[[str], None], before: int | None = None) -> Path | None:
    """The newest checkpoint without damage, of a step below `before`; those passed over are noted. Collective."""
    for candidate in _from_main(_checkpoints(folder)):
        if before is not None and _step(candidate) >= before:
            continue
        reason = damage_of(candidate)
        if reason is None:
            return candidate
        if dist.get_rank() == 0:
            note(f"checkpoint {candidate.name} is passed over: {reason}")
    return None


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if there is one."""
    return folder / f"step-{step:08d}"


def read_state(checkpoint: Path) -> TrainState:
    """The state of a whole checkpoint."""
    return TrainState(**json.loads((checkpoint / STATE).read_text()))


def open_fragments(checkpoint: Path) -> FragmentFiles:
    """The tensors of a whole checkpoint."""
    return FragmentFiles(sorted(checkpoint.glob("rank-*.safetensors")))


def load(engine: Any, part: Part, checkpoint: Path, cut: Cut | None = None) -> None:
    """Give the engine what a whole checkpoint of any layout holds, on all ranks together.

    With `cut`, what the checkpoint of the whole model holds of one without some units.

    Raises:
        UserError: the checkpoint is of another model.
    """
    try:
        files = open_fragments(checkpoint)
        try:
            source = files if cut is None else CutSource(cut, files)
            fill(engine, part, source, files.kinds, read_state(checkpoint).known)
        finally:
            files.close()
    except (KeyError, ValueError) as error:
        reason = f"it isn't a checkpoint of this model: {first_line(error)}"
        raise user_error("checkpoint.resume", reason, "set another `name` to start anew", str(checkpoint)) from error


_NAME = re.compile(r"step-(\d+)(\.old)?")


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, newest first; one that was about to be replaced comes after its successor."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.suffix == ""), reverse=True)


def _whole(folder: Path) -> list[Path]:
    """Those of them that have a manifest."""
    return [path for path in _checkpoints(folder) if (path / MANIFEST).is_file()]


def _remove(path: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it isn't one that has been damaged."""
    leftover = path.with_name(f"{path.name}.partial")
    path.rename(leftover)
    shutil.rmtree(leftover)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, the same phrase on every rank; each reads its share of the files. Collective."""
    foreign = _from_main(foreign_format(checkpoint))
    if foreign is not None:
        return foreign
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, damage(checkpoint, dist.get_rank(), dist.get_world_size()))
    return next((reason for reason in reasons if reason is not None), None)


def foreign_format(checkpoint: Path) -> str | None:
    """Why the files of a checkpoint can't be read by this version, in a phrase."""
    manifest = read_manifest(checkpoint)
    known = manifest is None or manifest.get("format") == FORMAT
    return None if known else "it was written by another version of ds_train"


def _from_main(own: Shared) -> Shared:
    box = [own]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _attempt(work: Callable[[], Any]) -> str | None:
    """Do `work`; why it failed, in a phrase. Whatever a save meets, the run goes on."""
    try:
        work()
    except OSError as error:
        reason = str(error.strerror or error)
        return f"{reason} ({error.filename})" if error.filename else reason
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None
