"""What is done with a checkpoint without its run: a transformers folder of it, or the same in other files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_train.checkpoint import hf
from ds_train.checkpoint.fragments import WEIGHT, Fragment, Shape
from ds_train.checkpoint.manifest import Written, damage, make_durable, write_manifest
from ds_train.checkpoint.native import FORMAT, STATE, foreign_format, open_fragments, read_state
from ds_train.checkpoint.shards import FragmentFiles, write_fragments
from ds_train.compress.cut import config_after
from ds_train.compress.packed import Packing
from ds_train.compress.post_training import Method, Rounded, quantize_folder, thin_folder
from ds_train.compress.sparsity import Pattern, Score
from ds_train.config import RunConfig, dump, load
from ds_train.config.quantize import QuantizeSection
from ds_train.data.build import load_data
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.errors import user_error
from ds_train.models.load import keep_generation_config, load_model_config, outline, position_of_first, untrained
from ds_train.models.tasks import model_inputs
from ds_train.plan.facts import is_run, model_folder


def export(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint's fp32 weights in `dtype` as a transformers folder, a file's worth in memory at a time.

    Raises:
        UserError: the checkpoint isn't whole, or its data or tokenizer are gone.
    """
    check(checkpoint)
    state = read_state(checkpoint)
    run = RunConfig.model_validate(state.recipe)
    tokenizer = prepared_tokenizer(prepare(run), run.model.trust_remote_code)
    facts = {"steps": state.step, "tokens": f"{state.tokens:,}", "task": run.task.kind, **state.versions}
    card = hf.model_card(run.name, facts, dump(run), run.model.path)
    files = open_fragments(checkpoint)
    try:
        model = outline(run, config_after(load_model_config(run, tokenizer), state.pruning))
        check_all_trained(model, checkpoint)
        keep_generation_config(run, model)
        quantize = run.compress.quantize
        packing = Packing.of(quantize, model) if quantize.bits else None
        hf.export_fragments(files, model, tokenizer, folder, card, dtype, packing=packing)
    finally:
        files.close()


def check_all_trained(model: PreTrainedModel, checkpoint: Path) -> None:
    """Refuse a model with numbers that no optimizer trains: a checkpoint has none of them."""
    names = untrained(model)
    if names:
        reason = f"the model's {min(names)} isn't trained, and checkpoints hold trained parameters alone"
        fix = "continue the run: it exports the whole model when it ends"
        raise user_error("checkpoint", reason, fix, str(checkpoint))


def quantize(
    source: Path, folder: Path, bits: int, group: int, method: Method, recipe: Path | None, samples: int
) -> Rounded:
    """Write a run's export, or any transformers folder, with rounded weights.

    Raises:
        UserError: there is no model, no data to look at, or the layers can't be rounded so.
    """
    model, batches = _model_and_samples(source, recipe, samples if method != "rtn" else 0)
    section = QuantizeSection.model_validate({"weights": f"int{bits}", "group": group})
    return quantize_folder(model, folder, section, method, batches)


def sparsify(source: Path, folder: Path, pattern: Pattern, score: Score, recipe: Path | None, samples: int) -> float:
    """Write a run's export, or any transformers folder, with zeros in its weights; the share of them.

    Raises:
        UserError: there is no model, no data to look at, or the pattern doesn't fit the layers.
    """
    model, batches = _model_and_samples(source, recipe, samples if score != "magnitude" else 0)
    return thin_folder(model, folder, pattern, score, batches)


def _model_and_samples(source: Path, recipe: Path | None, samples: int) -> tuple[Path, list[dict[str, Tensor]]]:
    """A transformers folder, and what its model is shown: of the recipe, or of the run whose folder it is."""
    recipe = source / "recipe.yaml" if recipe is None and is_run(source) else recipe
    model = model_folder(source)
    if not samples:
        return model, []
    if recipe is None:
        raise user_error("--recipe", "the method looks at samples, and a folder of weights has none", "give a recipe")
    return model, _calibration(load(recipe), samples)


def _calibration(run: RunConfig, count: int) -> list[dict[str, Tensor]]:
    """What the model takes of the first samples of the recipe's training."""
    prepared = prepare(run)
    tokenizer = prepared_tokenizer(prepared, run.model.trust_remote_code)
    micro = 8
    data = load_data(
        run, folder=prepared, tokenizer=tokenizer, data_rank=0, data_ranks=1, micro_samples=micro,
        eval_micro_samples=micro, first_position=position_of_first(load_model_config(run, tokenizer)),
    )  # fmt: skip
    places = data.train.order.index(np.arange(min(count, data.train.num_samples))).tolist()
    return [
        model_inputs(data.train.of_samples(places[start : start + micro])) for start in range(0, len(places), micro)
    ]


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
    """Refuse a checkpoint that isn't whole, or is another version's.

    Raises:
        UserError: what is wrong with it.
    """
    reason = foreign_format(checkpoint) or damage(checkpoint)
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
