"""Save and resume: DeepSpeed's shards plus our state, made whole by a manifest and an atomic rename.

RUN/checkpoints/step-00000100/   one whole checkpoint: DeepSpeed's files, state.json, manifest.json
RUN/checkpoints/*.partial/       a save that did not end; removed by the next one
RUN/checkpoints/latest           name of the newest whole checkpoint, replaced atomically, written last

What a step depends on besides the engine's state is a pure function of (recipe, step): the order of samples, masking,
dropout's seeds, the learning rate. So `state.json` needs one integer, and the rest of it is for checks and for people.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_train.checkpoint.manifest import MANIFEST, damage, write_json, write_manifest, write_text
from ds_train.errors import Problem, UserError, user_error

STATE = "state.json"
LATEST = "latest"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps, and what it was started with."""

    step: int
    tokens: int
    recipe: dict[str, Any]
    layout: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    wandb_id: str | None = None


def save(engine: Any, folder: Path, state: TrainState, keep_last: int, rank: int, barrier: Callable[[], None]) -> Path:
    """Save a whole checkpoint under `folder`, on all ranks together; older ones beyond `keep_last` go afterwards.

    Older checkpoints stay untouched until the new one is whole.
    """
    final = folder / f"step-{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    if rank == 0:
        for leftover in folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    # save_latest=False: DeepSpeed names the newest checkpoint before all ranks have written theirs (engine.py:4960).
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    barrier()
    if rank == 0:
        write_json(partial / STATE, asdict(state))
        write_manifest(partial, {"step": state.step})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_text(folder / LATEST, final.name)
        for old in _whole(folder)[keep_last:]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def find(folder: Path, resume: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None for a fresh start; damaged ones are passed over aloud.

    Raises:
        UserError: a named checkpoint that is not there or not whole; `never` in a folder that has checkpoints;
            `auto` in a folder where every checkpoint is damaged.
    """
    if resume not in ("auto", "never"):
        path = Path(resume).expanduser()
        reason = damage(path)
        if reason:
            raise user_error("checkpoint.resume", reason, "give the folder of a whole checkpoint, or auto", resume)
        return path
    candidates = _whole(folder)
    if not candidates:
        return None
    if resume == "never":
        raise user_error(
            "checkpoint.resume",
            f"{folder} already holds checkpoints that this run would replace",
            "set another `name`, or checkpoint.resume=auto to continue them",
            resume,
        )
    for candidate in candidates:
        reason = damage(candidate)
        if reason is None:
            return candidate
        note(f"checkpoint {candidate.name} is passed over: {reason}")
    raise user_error(
        "checkpoint.resume", f"no complete checkpoint in {folder}", "set another `name` to start anew", resume
    )


def read_state(checkpoint: Path) -> TrainState:
    """The state of a whole checkpoint."""
    return TrainState(**json.loads((checkpoint / STATE).read_text()))


def check_resumable(
    state: TrainState, recipe: Mapping[str, Any], layout: Mapping[str, Any], data_fingerprint: str
) -> None:
    """Refuse to continue a checkpoint under a recipe or layout that it wasn't made with.

    Raises:
        UserError: naming every key that differs and both values.
    """
    problems = [
        Problem(key, f"the checkpoint was made with {old}", "restore it, or set another `name` to start anew", new)
        for key, old, new in _differences(state.recipe, recipe)
    ]
    problems += [
        Problem(key, f"the checkpoint was saved with {state.layout.get(key)}", "start with the same layout", value)
        for key, value in layout.items()
        if state.layout.get(key) != value
    ]
    if not problems and state.data_fingerprint != data_fingerprint:
        problems = [Problem("data", "the prepared data has changed since the checkpoint", "restore the source files")]
    if problems:
        raise UserError(problems)


def load(engine: Any, checkpoint: Path) -> None:
    """Load the engine's shards of a whole checkpoint, on all ranks together."""
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise user_error("checkpoint.resume", "DeepSpeed found nothing to load", "set another `name`", str(checkpoint))


# Keys that change what a step computes. Everything else (logging, saving, evaluation, workers) may change on resume.
_MEANING = (
    "seed",
    "model",
    "task",
    "data",
    "batch.global_samples",
    "precision",
    "optimizer",
    "curriculum",
    "token_drop",
    "patch",
    "compress",
    "deepspeed",
)
_FREE = ("model.activation_checkpointing", "model.compile", "model.attention", "data.cache_dir", "data.workers")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    old_leaves, new_leaves = _leaves(old), _leaves(new)
    return [
        (key, old_leaves.get(key), new_leaves.get(key))
        for key in sorted(old_leaves.keys() | new_leaves.keys())
        if old_leaves.get(key) != new_leaves.get(key)
        and any(key == root or key.startswith(root + ".") for root in _MEANING)
        and key not in _FREE
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return leaves


def _whole(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, newest first."""
    found = [path for path in folder.glob("step-*") if path.suffix != ".partial" and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
