"""Export: the trained model as a transformers folder that plain `from_pretrained` loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ds_train.checkpoint.shards import write_safetensors
from ds_train.compress.cut import WholeTensors
from ds_train.compress.distill import PROJECTIONS
from ds_train.compress.packed import Packing
from ds_train.models.load import first_names, gathered, not_waiting, position_of_first
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import gather_whole

FILE_BYTES = 5 * 10**9
"""Weights in one file, about; the ranks of a pipeline stage write one after the other's worth."""

CARD = "README.md"


def export(
    part: Part, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, file_bytes: int = FILE_BYTES,
    packing: Packing | None = None,
) -> None:  # fmt: skip
    """Write safetensors, config, tokenizer and model card of the whole model into `folder`. Collective.

    Parameters that ZeRO-3 has partitioned or tensor ranks share are gathered one at a time, and each is kept by one
    rank of its pipeline stage until that has a file full of them: no rank holds the model. An older export is replaced
    only when the new one is whole. `packing`: how weights of few bits are written.
    """
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    model = part.outline
    if hasattr(part.model, "generation_config"):  # classifiers have none
        model.generation_config = part.model.generation_config
    if part.pipeline is None and hasattr(part.model, "_weight_conversions"):
        # The names that the files had; a stage has seen but its own, and the family's usual ones are taken.
        model._weight_conversions = part.model._weight_conversions
    groups = _own_groups(part, file_bytes)
    states = groups if packing is None else map(packing.state, groups)
    own = list(_write_weights(partial, model, states, dist.get_rank(), file_bytes))
    everyones: list[list[_File]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, own)
    if dist.get_rank() == 0:
        _finish(partial, folder, model, tokenizer, card, [file for files in everyones for file in files], packing)
    dist.barrier()


def export_fragments(
    files: WholeTensors, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str,
    dtype: torch.dtype, file_bytes: int = FILE_BYTES, packing: Packing | None = None,
) -> None:  # fmt: skip
    """As `export`, from a checkpoint and an outline of the model, in this process alone.

    The weights are the fp32 ones in `dtype`; packed ones are the run's own integers with scales in it. In memory are
    those of one file.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it
    groups = _by_layer(name for name in files.shapes if not name.startswith(PROJECTIONS))

    def state_of(names: list[str]) -> dict[str, Tensor]:
        state = {name: files.whole(name) for name in names}
        state = state if packing is None else packing.state(state)
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    written = list(_write_weights(partial, model, map(state_of, groups), 0, file_bytes))
    _finish(partial, folder, model, tokenizer, card, written, packing)


def model_card(name: str, facts: Mapping[str, Any], recipe: str, base_model: str | None = None) -> str:
    """The text of a model card: what the model is, how it was trained, and the recipe that does it again."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="transformers", tags=["ds_train"], base_model=base_model, model_name=name)
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    return (
        f"---\n{header.to_yaml()}\n---\n\n# {name}\n\nTrained with ds_train.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```\n"
    )


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub; the address of the commit. The repository is made if it isn't there.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, OSError: the hub doesn't take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True, private=True)
    return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with ds_train"))


@not_waiting()
def generate_sample(folder: Path, prompt: str, new_tokens: int, trust_remote_code: bool = False) -> str:
    """Load the exported causal model with transformers alone and continue `prompt` on the CPU, while it has positions.

    Drawn at temperature 0.8 from a fixed seed: a small model that only takes the likeliest token repeats itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:  # some say -1 for no end
        room = positions - position_of_first(model.config)
        tokens = tokens[:, 1 - room :]
        new_tokens = min(new_tokens, room - tokens.shape[1])
    torch.manual_seed(0)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0]))


@dataclass(frozen=True)
class _File:
    """A file of weights: its name until all are there, the names and the bytes of its tensors."""

    name: str
    tensors: tuple[str, ...]
    bytes: int


def _write_weights(
    folder: Path, model: PreTrainedModel, groups: Iterable[dict[str, Tensor]], rank: int, file_bytes: int
) -> Iterator[_File]:
    """Write this rank's weights, under the names that the family's files have."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    waiting: dict[str, Tensor] = {}
    number = 0

    def written() -> _File:
        file = _File(f"part-{rank:05d}-{number:05d}.safetensors", tuple(waiting), _bytes(waiting))
        write_safetensors(folder / file.name, list(waiting.items()), {"format": "pt"})
        return file

    for state in groups:
        named = {name: tensor for name, tensor in state.items() if name not in ignored}
        converted = revert_weight_conversion(model, named)
        if waiting and _bytes(waiting) + _bytes(converted) > file_bytes:
            yield written()
            waiting.clear()
            number += 1
        waiting.update(converted)
    if waiting:
        yield written()


def _finish(
    partial: Path, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str,
    files: list[_File], packing: Packing | None,
) -> None:  # fmt: skip
    """Everything besides the weights; then the folder takes the place of an older one."""
    use_cache, model.config.use_cache = model.config.use_cache, True
    if packing is not None:
        model.config.quantization_config = packing.config(model)
    # Config, generation config, a hub model's own code: all that belongs to it, with a file of no weights.
    model.save_pretrained(partial, state_dict={})
    model.config.use_cache = use_cache
    for empty in partial.glob("model*.safetensors"):
        empty.unlink()
    tokenizer.save_pretrained(partial)
    (partial / CARD).write_text(card, encoding="utf-8")
    weights: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        one = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (partial / file.name).rename(partial / one)
        weights |= dict.fromkeys(file.tensors, one)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": weights}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _own_groups(part: Part, file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Whole layers that this rank writes, on the host. Collective: every rank of a stage gathers all of the stage."""
    place, layout = part.mesh.place, part.mesh.layout
    first = first_names(part.outline)
    parameters = {first[name]: parameter for name, parameter in part.model.named_parameters()}
    replicas = layout.data * layout.sequence * layout.tensor
    index = (place.data * layout.sequence + place.sequence) * layout.tensor + place.tensor
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters.values())
    size = sum(torch.Size(shape).numel() for shape in shapes) * part.model.dtype.itemsize
    writers = min(replicas, ceil(size / file_bytes))
    buffers = _persistent_buffers(part.model)
    stages: list[tuple[int, list[str]]] = [(0, [])] * layout.ranks
    dist.all_gather_object(stages, (place.pipe, list(buffers)))
    earlier = {name for pipe, names in stages if pipe < place.pipe for name in names}
    buffers = {name: buffer for name, buffer in buffers.items() if name not in earlier}
    written = (name for name in (*parameters, *buffers) if not name.startswith(PROJECTIONS))
    for number, names in enumerate(_by_layer(written)):
        mine = number % writers == index
        state = {}
        for name in names:
            if name in buffers:
                if mine:
                    state[name] = buffers[name].detach().cpu()
                continue
            parameter = parameters[name]
            if getattr(parameter, "ds_pipe_replicated", False):
                continue  # the first stage's, which is the same
            with gathered([parameter]):
                whole = gather_whole(parameter, part.mesh.tensor)
                if mine:
                    state[name] = whole.to("cpu", copy=True)
        if mine:
            yield state


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of one layer together, since a family's files may join or split a layer's weights."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return list(groups.values())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
