"""What is done with a checkpoint without its run: a transformers folder of it, or the same in other files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ds_train.checkpoint import hf
from ds_train.checkpoint.fragments import WEIGHT, Fragment, Shape
from ds_train.checkpoint.manifest import Written, damage, make_durable, write_manifest
from ds_train.checkpoint.native import FORMAT, STATE, open_fragments, read_state
from ds_train.checkpoint.shards import FragmentFiles, write_fragments
from ds_train.compress.cut import config_after
from ds_train.config import RunConfig, dump
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.errors import user_error
from ds_train.models.load import load_model_config, outline


def export(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint's fp32 weights in `dtype` as a transformers folder, a file's worth in memory at a time.

    Raises:
        UserError: the checkpoint isn't whole, or its data or tokenizer are gone.
    """
    check(checkpoint)
    state = read_state(checkpoint)
    run = RunConfig.model_validate(state.recipe)
    tokenizer = prepared_tokenizer(prepare(run))
    facts = {"steps": state.step, "tokens": f"{state.tokens:,}", "task": run.task.kind, **state.versions}
    card = hf.model_card(run.name, facts, dump(run), run.model.path)
    files = open_fragments(checkpoint)
    try:
        config = config_after(load_model_config(run, tokenizer), state.pruning)
        hf.export_fragments(files, outline(run, config), tokenizer, folder, card, dtype)
    finally:
        files.close()


def rewrite(checkpoint: Path, folder: Path, file_bytes: int = hf.FILE_BYTES) -> None:
    """Write a whole checkpoint again, with whole parameters in files of about `file_bytes`.

    A checkpoint of many ranks has as many files, each with a piece of every layer; these are fewer to move and to open.
    In memory are one file's tensors. What is written is read back and compared.

    Raises:
        UserError: the checkpoint isn't whole, or `folder` is there already.
    """
    check(checkpoint)
    if folder.exists():
        raise user_error("reshard", "the folder is there already", "give a new one", str(folder))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = open_fragments(checkpoint)
    try:
        written: list[Written] = []
        for names in _batches(files, file_bytes):
            path = partial / f"rank-{len(written):05d}-0.safetensors"
            written.append(write_fragments(path, [_whole(files, name) for name in names]))
        shutil.copy(checkpoint / STATE, partial / STATE)
        write_manifest(partial, {"format": FORMAT, "step": read_state(checkpoint).step}, written)
        again = open_fragments(partial)
        try:
            _compare(files, again)
        finally:
            again.close()
    finally:
        files.close()
    make_durable(partial)
    partial.rename(folder)


def check(checkpoint: Path) -> None:
    """Refuse a checkpoint that isn't whole.

    Raises:
        UserError: what is wrong with it.
    """
    reason = damage(checkpoint)
    if reason is not None:
        fix = "give the folder of a whole checkpoint, RUN/checkpoints/step-*"
        raise user_error("checkpoint", reason, fix, str(checkpoint))


def _whole(files: FragmentFiles, name: str) -> Fragment:
    tensors = {kind: files.whole(name, kind).reshape(-1) for kind in (WEIGHT, *files.kinds)}
    return Fragment(name, Shape(files.shapes[name].whole, None, 1), 0, 0, tensors)


def _batches(files: FragmentFiles, file_bytes: int) -> list[list[str]]:
    """Names whose weights and states fill a file."""
    per_element = 4 + sum(dtype.itemsize for dtype in files.kinds.values())
    batches: list[list[str]] = [[]]
    size = 0
    for name, shape in files.shapes.items():
        own = torch.Size(shape.whole).numel() * per_element
        if batches[-1] and size + own > file_bytes:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += own
    return batches


def _compare(one: FragmentFiles, other: FragmentFiles) -> None:
    for name in one.shapes:
        for kind in (WEIGHT, *one.kinds):
            if not torch.equal(one.whole(name, kind), other.whole(name, kind)):
                raise OSError(f"{kind} of {name} isn't what was written: the disk can't be trusted")
