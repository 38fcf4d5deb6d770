"""Texts that the model continues during training, for people to read along."""

from __future__ import annotations

import torch

from ds_train.config import RunConfig
from ds_train.engine.build import Assembly


@torch.no_grad()
def continue_prompts(run: RunConfig, parts: Assembly) -> list[tuple[str, str]]:
    """(prompt, continuation) of each of `track.eval_prompts`, by the likeliest tokens. Collective.

    Every rank generates the same: under ZeRO-3 each forward pass gathers weights from all of them.
    """
    if not run.track.eval_prompts:
        return []
    tokenizer, model, device = parts.data.tokenizer, parts.model, parts.engine.device
    new_tokens = min(run.track.sample_tokens, run.data.sequence_length - 1)
    parts.engine.eval()
    found = []
    for prompt in run.track.eval_prompts:
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
        tokens = tokens[:, -(run.data.sequence_length - new_tokens) :]  # the model may have no more positions
        whole = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        found.append((prompt, str(tokenizer.decode(whole[0, tokens.shape[1] :]))))
    parts.engine.train()
    return found
