"""Which keys of a recipe make it another run, that no checkpoint of the old one can be continued with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig
from ds_train.config.base import Section
from ds_train.errors import Problem, UserError, shown

if TYPE_CHECKING:
    from ds_train.checkpoint.native import TrainState

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
    "layer_drop",
    "patch",
    "compress",
    "deepspeed",
)
_FREE = (
    "model.activation_checkpointing",
    "model.attention",
    "model.compile",
    "model.lean_activations",
    "model.liger",
    "data.cache_dir",
    "data.workers",
    "optimizer.kernel",
    "compress.prune.parallel",
    "compress.distill.placement",
)
_SAID = ("schedule", "batch", "health")
"""Sections that may change on resume, and that losses depend on from there."""

_PLACES_OF_DATA = ("data.path", "data.validation_path")


def bad_checkpoint(resume: str, reason: str) -> Problem:
    """What `checkpoint.resume` names can't be continued."""
    return Problem("checkpoint.resume", reason, "give the folder of a whole checkpoint, or auto", resume)


def check_resumable(state: TrainState, recipe: Mapping[str, Any], data_fingerprint: str) -> None:
    """Refuse to continue a checkpoint under a recipe that means another run. The layout may be any, and so may the
    place of data whose content is the same.

    Raises:
        UserError: naming every key that differs and both values.
    """
    same_data = state.data_fingerprint == data_fingerprint
    fix = "restore it, or set another `name` to start anew"
    problems = [
        Problem(key, f"the checkpoint was made with {shown(old)}", fix, new)
        for key, old, new in _differences(state.recipe, recipe)
        if not (same_data and key in _PLACES_OF_DATA)
    ]
    if not problems and not same_data:
        problems = [Problem("data", "the prepared data has changed since the checkpoint", "restore the source files")]
    if problems:
        raise UserError(problems)


def said_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a resumed run does otherwise from here on, though it may: a phrase for each key."""
    return [f"{key} was {shown(before)} and is now {shown(now)}" for key, before, now in _differences(old, new, _SAID)]


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], roots: Sequence[str] = _MEANING
) -> list[tuple[str, Any, Any]]:
    # A key that came with a later version had its default before.
    defaults = _defaults()
    old_leaves, new_leaves = leaves(_over(defaults, old)), leaves(_over(defaults, new))
    return [
        (key, old_leaves.get(key), new_leaves.get(key))
        for key in sorted(old_leaves.keys() | new_leaves.keys())
        if old_leaves.get(key) != new_leaves.get(key) and _is_below(key, roots) and not _is_below(key, _FREE)
    ]


@cache
def _defaults() -> Mapping[str, Any]:
    """What a recipe says that says nothing; without the keys that every recipe gives."""
    sections = {
        name: field.annotation.model_construct()
        for name, field in RunConfig.model_fields.items()
        if field.is_required() and isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    return RunConfig.model_construct(None, **sections).model_dump(mode="json")


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping `above`, and of `below` what it doesn't have."""
    both = {
        key: _over(below[key], value) if isinstance(value, Mapping) and isinstance(below.get(key), Mapping) else value
        for key, value in above.items()
    }
    return {**below, **both}


def _is_below(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested mappings by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
