"""Layer reduction: a pretrained model of fewer layers, as a transformers folder that every layout starts from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_train.config import RunConfig
from ds_train.errors import user_error
from ds_train.models.load import load_model_config, outline
from ds_train.plan.model_size import of_kept_layers

FOLDER = "start"
"""In the run's folder: what the model starts from."""


def start_from_kept_layers(run: RunConfig, tokenizer: object) -> RunConfig:
    """Write the run's start, if it isn't there yet, and give the recipe that starts from it.

    Its teacher, where none is named, is the whole model. One file's tensors at a time are in memory.

    Raises:
        UserError: there are no safetensors, or no such layers.
    """
    folder = Path(run.run_root).expanduser() / run.name / FOLDER
    kept = run.model.keep_layers or []
    asked = json.dumps({"path": run.model.path, "revision": run.model.revision, "layers": kept})
    mark = folder / "kept_layers.json"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != asked:
        source = _local(run)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        partial = folder.with_name(FOLDER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        place = _place_of_layers(outline(run, load_model_config(run, tokenizer)))  # type: ignore[arg-type]
        index: dict[str, str] = {}
        for path in sorted(source.glob("*.safetensors")):
            tensors = _kept(path, place, kept)
            if tensors:
                save_file(tensors, partial / path.name, {"format": "pt"})
            index |= dict.fromkeys(tensors, path.name)
        (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (partial / "config.json").write_text(json.dumps(of_kept_layers(config, kept), indent=2))
        (partial / mark.name).write_text(asked, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    model = run.model.model_copy(update={"path": str(folder), "keep_layers": None, "revision": None})
    distill = run.compress.distill
    if distill.active and distill.teacher is None:
        distill = distill.model_copy(update={"teacher": run.model.path})
    compress = run.compress.model_copy(update={"distill": distill})
    return run.model_copy(update={"model": model, "compress": compress})


def _local(run: RunConfig) -> Path:
    path = Path(str(run.model.path)).expanduser()
    if not path.is_dir():
        path = Path(snapshot_download(str(run.model.path), revision=run.model.revision))
    if not any(path.glob("*.safetensors")):
        reason = "layers are left out of safetensors files, and there are none"
        raise user_error("model.keep_layers", reason, "save the model anew with transformers", str(path))
    return path


def _place_of_layers(model: nn.Module) -> re.Pattern[str]:
    """What the names of the layers' weights have before and after their number."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name = max(lists, key=lambda item: len(item[1]))[0].rpartition(".")[2]
    return re.compile(rf"((?:^|.*?\.){name}\.)(\d+)(\..*)")


def _kept(path: Path, place: re.Pattern[str], kept: list[int]) -> dict[str, Tensor]:
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found = place.fullmatch(name)
            if found is None:
                tensors[name] = file.get_tensor(name)
            elif int(found[2]) in kept:
                tensors[f"{found[1]}{kept.index(int(found[2]))}{found[3]}"] = file.get_tensor(name)
    return tensors
