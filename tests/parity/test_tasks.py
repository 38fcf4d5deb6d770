"""Masked language models and classifiers: the losses of a plain PyTorch loop, at ZeRO stages and with tensor ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from ds_train.config import load
from ds_train.data.order import Order
from ds_train.data.prepare import open_split, prepare
from ds_train.data.samples import MaskedSamples, PackedSamples
from ds_train.data.tokenizer import byte_tokenizer

pytestmark = pytest.mark.parity

STEPS, GLOBAL, LENGTH, SEED, LR = 8, 8, 32, 6, 2e-3
LAYOUTS = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "tensor2": {"tensor": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without dropout and its byte-level tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("weights") / "bert"
    torch.manual_seed(9)
    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        pad_token_id=257,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_recipe(folder: Path, name: str, weights: Path, task: dict[str, Any], data: dict[str, Any]) -> Path:
    recipe = {
        "name": name,
        "seed": SEED,
        "run_root": str(folder / "runs"),
        "model": {"path": str(weights)},
        "task": task,
        "data": {
            **data,
            "tokenizer": "model",
            "sequence_length": LENGTH,
            "cache_dir": str(folder / "cache"),
            "validation_fraction": 0.0,
        },
        "batch": {"global_samples": GLOBAL, "micro_samples": 2},
        "parallel": LAYOUTS[name],
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": LR, "weight_decay": 0.0, "clip_norm": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"steps": STEPS, "kind": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"save_final": False, "export": False},
        "track": {"peak_tflops": 1.0, "progress": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def train(model: torch.nn.Module, batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> list[float]:
    """Plain Adam over whole global batches of (model inputs, labels)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    model.train()
    history = []
    for inputs, labels in batches:
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def test_classifier(weights: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    rows = [
        ("good " * int(n) if label else "bad " * int(n) + "x", label)
        for n, label in zip(random.integers(1, 9, 40), random.integers(0, 3, 40), strict=True)
    ]
    (tmp_path / "rows.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    data = {
        "source": "tsv",
        "path": str(tmp_path / "rows.tsv"),
        "text_column": "0",
        "label_column": "1",
        "packing": False,
    }
    task = {"kind": "sequence-classification", "num_labels": 3}
    recipes = [str(write_recipe(tmp_path, name, weights, task, data)) for name in LAYOUTS]
    run_ranks(2, ["tests/parity/train_many.py", *recipes], timeout_s=300).check()

    from ds_train.models.load import build_model, load_model_config

    run = load(recipes[0])
    model = build_model(
        run, load_model_config(run, byte_tokenizer()), {}, 0
    )  # the new head's weights come from the seed
    plain = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=3, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    order, batches = Order(len(rows), SEED), []
    for step in range(STEPS):
        chosen = [rows[int(order.index(step * GLOBAL + j))] for j in range(GLOBAL)]
        ids = [list(text.encode())[:LENGTH] for text, _ in chosen]
        inputs = torch.tensor([row + [257] * (LENGTH - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (LENGTH - len(row)) for row in ids])
        batches.append(({"input_ids": inputs, "attention_mask": mask}, torch.tensor([label for _, label in chosen])))
    expected = train(plain, batches)
    for name in LAYOUTS:
        np.testing.assert_allclose(losses(tmp_path, name), expected, rtol=1e-5, err_msg=name)


def test_masked_language_model_on_packed_documents(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"document {number} says hello " * (1 + number % 4))
    data = {"source": "text", "path": str(tmp_path / "text")}
    recipes = [str(write_recipe(tmp_path, name, weights, {"kind": "masked-lm"}, data)) for name in LAYOUTS]
    run_ranks(2, ["tests/parity/train_many.py", *recipes], timeout_s=300).check()
    file = open_split(prepare(load(recipes[0])), "train")
    assert file is not None
    packed = PackedSamples(file, LENGTH)
    masked = MaskedSamples(packed, 0.15, range(259), 258, frozenset({256, 257, 258}), SEED)
    order, batches = Order(len(packed), SEED), []
    for step in range(STEPS):
        places = range(step * GLOBAL, (step + 1) * GLOBAL)
        samples = [masked.at(int(order.index(place)), place) for place in places]
        positions = torch.tensor(np.stack([sample["position_ids"] for sample in samples]))
        mask = torch.zeros(GLOBAL, 1, LENGTH, LENGTH, dtype=torch.bool)
        for row in range(GLOBAL):  # a token sees its own document and nothing else
            starts = [t for t in range(LENGTH) if positions[row, t] == 0] + [LENGTH]
            for low, high in itertools.pairwise(starts):
                mask[row, 0, low:high, low:high] = True
        ids = torch.tensor(np.stack([sample["input_ids"] for sample in samples]))
        labels = torch.tensor(np.stack([sample["labels"] for sample in samples]))
        batches.append(({"input_ids": ids, "position_ids": positions, "attention_mask": mask}, labels))
    expected = train(AutoModelForMaskedLM.from_pretrained(weights, dtype=torch.float32), batches)
    for name in LAYOUTS:
        np.testing.assert_allclose(losses(tmp_path, name), expected, rtol=1e-5, err_msg=name)
