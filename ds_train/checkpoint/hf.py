"""Export: the trained model as a transformers folder that plain `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_train.models.load import gathered


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, rank: int) -> None:
    """Write safetensors, config and tokenizer into `folder`, on all ranks together; rank 0 writes.

    Parameters that ZeRO-3 has partitioned are gathered one at a time; rank 0 keeps each on the host.
    An older export is replaced only when the new one is whole.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with gathered([parameter]):
            if rank == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if rank != 0:
        return
    # Tied weights are one tensor again, so that they are stored once.
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[owners.setdefault(id(parameter), name)]
    state.update({name: buffer.detach().cpu() for name, buffer in _persistent_buffers(model).items()})
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


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
