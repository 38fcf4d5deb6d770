"""Every ZeRO stage, with and without offload, on 1, 2 and 4 ranks: the losses of a plain PyTorch loop."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import CLIP, DECAY, GLOBAL, LENGTH, LR, SEED, history_of, write_corpus, write_recipe
from ranks import run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ds_train.data.order import Order

pytestmark = pytest.mark.parity

STEPS = 12
EOS = 256
LAYOUTS = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2-cpu": {"zero_stage": 2, "offload_optimizer": "cpu", "pin_memory": False},
    "zero3-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu", "pin_memory": False},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("parity") / "corpus")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped-query attention and random weights, as a transformers folder."""
    folder = tmp_path_factory.mktemp("weights") / "llama"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plain_loop(corpus: Path, weights: Path, dtype: torch.dtype = torch.float32) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: torch and transformers only, the whole global batch in one forward pass."""
    documents = [[*path.read_bytes(), EOS] for path in sorted(corpus.glob("*.txt"))]
    tokens = [token for document in documents for token in document]
    owner = [index for index, document in enumerate(documents) for _ in document]
    place = [position for document in documents for position in range(len(document))]
    windows = len(tokens) // LENGTH
    order = Order(windows, SEED)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    history = []
    for step in range(STEPS):
        ids = torch.zeros(GLOBAL, LENGTH, dtype=torch.long)
        labels = torch.full((GLOBAL, LENGTH), -100)
        positions = torch.zeros(GLOBAL, LENGTH, dtype=torch.long)
        mask = torch.full((GLOBAL, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min)
        for row in range(GLOBAL):
            start = int(order.index(step * GLOBAL + row)) * LENGTH
            for t in range(LENGTH):
                here = start + t
                first = max(start, here - place[here])  # the document's first token in this window
                ids[row, t] = tokens[here]
                positions[row, t] = here - first
                if here + 1 < len(tokens) and owner[here + 1] == owner[here]:
                    labels[row, t] = tokens[here + 1]
                mask[row, 0, t, first - start : t + 1] = 0.0
        lr = LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, 300), labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def zero_recipe(
    folder: Path, name: str, corpus: Path, weights: Path, dtype: str, parallel: dict[str, Any], **model: Any
) -> Path:
    sections = {"precision": {"dtype": dtype}, "model": model, "schedule": {"steps": STEPS}}
    return write_recipe(folder, name, corpus, weights, "llama", parallel, **sections)


@pytest.fixture(scope="module")
def reference(corpus: Path, weights: Path) -> list[tuple[float, float]]:
    return plain_loop(corpus, weights)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (1, ("zero0", "zero2-cpu", "zero3")),
        (2, tuple(LAYOUTS)),
        (4, ("zero1", "zero2", "zero3-cpu")),
        *(pytest.param(ranks, tuple(LAYOUTS), marks=pytest.mark.exhaustive) for ranks in (1, 4)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} layouts",
)
def test_fp32_losses_equal_a_plain_loop(
    ranks: int,
    names: tuple[str, ...],
    corpus: Path,
    weights: Path,
    reference: list[tuple[float, float]],
    tmp_path: Path,
) -> None:
    recipes = [zero_recipe(tmp_path, name, corpus, weights, "fp32", LAYOUTS[name]) for name in names]
    run_ranks(ranks, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=600).check()
    assert reference[0][0] > 1.1 * reference[-1][0], "the reference doesn't learn, so it shows nothing"
    for name in names:
        np.testing.assert_allclose(history_of(tmp_path, name), reference, rtol=1e-5, err_msg=f"{name} on {ranks} ranks")


@pytest.mark.parametrize("name", ["zero3", pytest.param("zero2", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("feature", ["activation_checkpointing", "compile"])
def test_what_saves_memory_or_time_changes_no_loss(
    feature: str, name: str, corpus: Path, weights: Path, reference: list[tuple[float, float]], tmp_path: Path
) -> None:
    if feature == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    recipe = zero_recipe(tmp_path, name, corpus, weights, "fp32", LAYOUTS[name], **{feature: True})
    run_ranks(2, ["tests/parity/train_many.py", str(recipe)], timeout_s=600).check()
    np.testing.assert_allclose(history_of(tmp_path, name), reference, rtol=1e-5)


def test_bf16_losses_follow_a_plain_loop(corpus: Path, weights: Path, tmp_path: Path) -> None:
    names = ["zero1", "zero2-cpu", "zero3"]
    recipes = [zero_recipe(tmp_path, name, corpus, weights, "bf16", LAYOUTS[name]) for name in names]
    run_ranks(2, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=600).check()
    losses = [loss for loss, _ in plain_loop(corpus, weights, torch.bfloat16)]
    for name in names:
        np.testing.assert_allclose([loss for loss, _ in history_of(tmp_path, name)], losses, rtol=2e-2, err_msg=name)
