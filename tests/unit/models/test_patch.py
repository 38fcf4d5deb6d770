"""Patches against embeddings averaged by hand and plain cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_token_drop import build

from ds_train.models.patch import embed_patches
from ds_train.models.tasks import TaskLoss

B, P, K = 2, 6, 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_loss_and_gradients_are_those_of_averaged_embeddings(family: str) -> None:
    model: Any = build(family)
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 60, (B, P, K), generator=draw)
    labels = torch.randint(3, 60, (B, P, K), generator=draw)
    labels[:, -1] = labels[0, 2, 1:] = -100
    positions = torch.cat([torch.arange(2), torch.arange(P - 2)]).expand(B, -1).contiguous()
    embeddings = model.get_input_embeddings()(tokens.flatten(1)).view(B, P, K, -1).mean(2)
    logits = model(inputs_embeds=embeddings, position_ids=positions).logits
    expected = sum(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, :, k].flatten(), reduction="sum")
        for k in range(K)
    )
    expected.backward()  # type: ignore[union-attr]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    embed_patches(model)
    task = TaskLoss(model)
    assert task.fused == (family != "gemma2")
    loss = task.train_loss(model, {"input_ids": tokens, "labels": labels, "position_ids": positions})
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_model_takes_single_tokens_as_ever() -> None:
    model: Any = build("llama")
    tokens = torch.arange(3, 15)[None]
    before = model(input_ids=tokens).logits
    embed_patches(model)
    assert torch.equal(model(input_ids=tokens).logits, before)
