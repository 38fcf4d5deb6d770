"""Layer reduction: a pretrained model of fewer layers, as a transformers folder that every layout starts from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_train.config import RunConfig
from ds_train.errors import user_error
from ds_train.models.fewer_layers import check_layers, config_of_layers, list_of_layers
from ds_train.models.load import load_model_config, outline

FOLDER = "start"
"""In the run's folder: what the model starts from."""

_KEY = "model.keep_layers"
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py")
"""Kinds of files that belong to a model beside its weights: generation settings, tokenizer, a hub model's own code."""


def start_from_kept_layers(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunConfig:
    """Write the run's start, if it isn't there yet or not from these weights, and give the recipe that starts from it.

    Its teacher, where none is named, is the whole model. One file's tensors at a time are in memory.

    Raises:
        UserError: there are no safetensors, or no such layers, or the model's config can't say what they are alone.
    """
    folder = Path(run.run_root).expanduser() / run.name / FOLDER
    mark, asked = folder / "kept_layers.json", _asked(run)
    if not mark.is_file() or mark.read_text(encoding="utf-8") != asked:
        partial = folder.with_name(FOLDER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(run, tokenizer, partial)
        (partial / mark.name).write_text(asked, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    model = run.model.model_copy(update={"path": str(folder), "keep_layers": None, "revision": None})
    distill = run.compress.distill
    if distill.active and distill.teacher is None:
        distill = distill.model_copy(update={"teacher": run.model.path})
    compress = run.compress.model_copy(update={"distill": distill})
    return run.model_copy(update={"model": model, "compress": compress})


def _asked(run: RunConfig) -> str:
    """What the start is made from: of a folder its files, by size and time, of a hub model the revision."""
    path = Path(str(run.model.path))
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    source = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    model = run.model
    return json.dumps({"path": model.path, "revision": model.revision, "layers": model.keep_layers, "files": source})


def _write(run: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    kept, source = run.model.keep_layers or [], _local(run)
    unreduced = run.model_copy(update={"model": run.model.model_copy(update={"keep_layers": None})})
    whole = outline(unreduced, load_model_config(unreduced, tokenizer))
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=run.model.trust_remote_code)
    try:
        check_layers(whole, outline(run, load_model_config(run, tokenizer)), kept)
        fewer = config_of_layers(config, kept)
    except ValueError as error:
        raise _refusal(run, str(error)) from error
    # Beside the layers themselves, whatever is named so: the files' names may be older than the model's.
    place = re.compile(rf"((?:^|.*?\.){list_of_layers(whole).rpartition('.')[2]}\.)(\d+)(\..*)")
    index: dict[str, str] = {}
    seen: set[int] = set()
    for path in _weights(source):
        tensors, layers = _kept(path, place, kept)
        seen |= layers
        if tensors:
            save_file(tensors, folder / path.name, {"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    if not seen >= {*kept}:
        raise _refusal(run, f"its files have no weights of layer {min({*kept} - seen)} by that name")
    for path in source.iterdir():
        if path.is_file() and path.suffix in _BESIDE and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    fewer.save_pretrained(folder)


def _refusal(run: RunConfig, reason: str) -> Exception:
    fix = "keep other layers (the first ones, say), or start from a model that has been saved with fewer"
    return user_error(_KEY, reason, fix, run.model.keep_layers)


def _local(run: RunConfig) -> Path:
    path = Path(str(run.model.path))
    if not path.is_dir():
        path = Path(snapshot_download(str(run.model.path), revision=run.model.revision))
    if not any(path.glob("*.safetensors")):
        reason = "layers are left out of safetensors files, and there are none"
        raise user_error(_KEY, reason, "save the model anew with transformers", str(path))
    return path


def _weights(source: Path) -> list[Path]:
    """The files that transformers would load; others may hold the same weights in another form."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [source / name for name in sorted({*names})]
    single = source / "model.safetensors"
    return [single] if single.is_file() else sorted(source.glob("*.safetensors"))


def _kept(path: Path, place: re.Pattern[str], kept: list[int]) -> tuple[dict[str, Tensor], set[int]]:
    """A file's tensors under their new names, and the layers that they are of."""
    tensors, layers = {}, set()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found = place.fullmatch(name)
            if found is None:
                tensors[name] = file.get_tensor(name)
            elif int(found[2]) in kept:
                layers.add(int(found[2]))
                tensors[f"{found[1]}{kept.index(int(found[2]))}{found[3]}"] = file.get_tensor(name)
    return tensors, layers
