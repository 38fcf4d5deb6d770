"""Export: the trained model as a transformers folder that plain `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_train.models.load import gathered
from ds_train.parallel.build import Part
from ds_train.parallel.tensor import gather_whole
from ds_train.plan.topology import Coordinates


def export(part: Part, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, config and tokenizer of the whole model into `folder`. Collective; rank 0 writes.

    Parameters that ZeRO-3 has partitioned or tensor ranks share are gathered one at a time, and those of other
    pipeline stages sent one at a time; rank 0 keeps each on the host. An older export is replaced only when the new
    one is whole.
    """
    state = _own_state(part)
    for stage in range(1, part.mesh.layout.pipe):
        _hand_over(state, part, part.mesh.layout.rank(Coordinates(stage, 0, 0, 0)))
    if dist.get_rank() != 0:
        return
    # Tied weights are one tensor again, so that they are stored once.
    model = part.outline
    if hasattr(part.model, "generation_config"):  # classifiers have none
        model.generation_config = part.model.generation_config
    if part.pipeline is None and hasattr(part.model, "_weight_conversions"):
        # The names that the files had; a stage has seen but its own, and the family's usual ones are taken.
        model._weight_conversions = part.model._weight_conversions
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[owners.setdefault(id(parameter), name)]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(partial, state_dict=state)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def generate_sample(folder: Path, prompt: str, new_tokens: int) -> str:
    """Load the exported causal model with transformers alone and continue `prompt` on the CPU.

    Drawn at temperature 0.8 from a fixed seed: a small model that only takes the likeliest token repeats itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0]))


def _own_state(part: Part) -> dict[str, torch.Tensor]:
    """What this rank's stage holds, whole, on the host; empty on ranks that another one speaks for. Collective."""
    place = part.mesh.place
    speaks = place.data == place.sequence == place.tensor == 0
    state: dict[str, torch.Tensor] = {}
    for name, parameter in part.model.named_parameters(remove_duplicate=False):
        with gathered([parameter]):
            whole = gather_whole(parameter, part.mesh.tensor)
            if speaks:
                state[name] = whole.to("cpu", copy=True)
    if speaks:
        state.update({name: buffer.detach().cpu() for name, buffer in _persistent_buffers(part.model).items()})
    return state


def _hand_over(state: dict[str, torch.Tensor], part: Part, speaker: int) -> None:
    """Give rank 0 what `speaker` holds, a tensor at a time. The other ranks do nothing."""
    rank, device = dist.get_rank(), next(part.module.parameters()).device
    if rank == speaker:
        dist.send_object_list([[(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]], dst=0)
        for tensor in state.values():
            dist.send(tensor.contiguous().to(device), dst=0)
    elif rank == 0:
        box: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]]
        dist.recv_object_list(box, src=speaker)
        for name, shape, dtype in box[0]:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, src=speaker)
            state[name] = tensor.cpu()


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
