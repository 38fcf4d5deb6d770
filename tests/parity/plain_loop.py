"""The oracle of layouts: torch and transformers alone, the whole global batch in one forward pass, and its recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ranks import run_ranks
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ds_train.config import load
from ds_train.data.build import load_data
from ds_train.data.prepare import prepare, prepared_tokenizer

STEPS, GLOBAL, LENGTH, SEED, LR, DECAY, CLIP = 10, 8, 48, 3, 3e-3, 0.1, 0.5

_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
MASKED = ("bert",)
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.1},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 16},
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 4},
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "tensor2": {"tensor": 2},
    "pipeline2": {"pipeline": 2},
    "sequence2": {"sequence": 2},
}
"""A layout on two ranks of every kind."""
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma2", "phi", "olmo2", "starcoder2", "gpt2", "bert",
)  # fmt: skip


def write_corpus(folder: Path) -> Path:
    """60 documents of uneven length, many of them shorter than a window."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    words = ["alpha", "be", "gamma ray", "d", "epsilon\n", "zeta zeta", "été"]
    for index in range(60):
        text = " ".join(random.choice(words, size=int(random.integers(1, 60))))
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_weights(folder: Path, family: str, vocabulary: int = 300) -> Path:
    """A small model of the family with random weights and no dropout, as a transformers folder."""
    known = AutoConfig.for_model(family).to_dict()
    wanted = _SIZES | _OWN.get(family, {})
    sizes = {key: value for key, value in wanted.items() if key in known} | {"vocab_size": vocabulary}
    dropout = {key: 0.0 for key, value in known.items() if isinstance(value, float) and "drop" in key}
    special = {key: known[key] if (known[key] or 0) < 300 else None for key in known if key.endswith("_token_id")}
    config = AutoConfig.for_model(family, **special, **sizes, **dropout)
    torch.manual_seed(7)
    auto: Any = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():  # norms that are all ones and biases that are all zeros would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def write_recipe(
    folder: Path, name: str, corpus: Path, weights: Path, family: str, parallel: dict[str, Any], **sections: Any
) -> Path:
    """A recipe of `STEPS` steps; `sections` are merged over its own."""
    recipe: dict[str, Any] = {
        "name": name,
        "seed": SEED,
        "run_root": str(folder / "runs"),
        "model": {"path": str(weights)},
        "task": {"kind": "masked-lm" if family in MASKED else "causal-lm"},
        "data": {
            "source": "text", "path": str(corpus), "tokenizer": "bytes", "sequence_length": LENGTH,
            "cache_dir": str(folder / "cache"), "validation_fraction": 0.0,
        },
        "batch": {"global_samples": GLOBAL, "micro_samples": 1},
        "parallel": parallel,
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": LR, "weight_decay": DECAY, "clip_norm": CLIP},
        "schedule": {"steps": STEPS, "warmup_fraction": 0.0},
        "checkpoint": {"save_final": False, "export": False},
        "track": {"peak_tflops": 1.0, "progress": False},
    }  # fmt: skip
    for key, value in sections.items():
        recipe[key] = recipe.get(key, {}) | value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def whole_batches(recipe: Path) -> Iterator[dict[str, Tensor]]:
    """The global batch of each step."""
    run = load(str(recipe))
    folder = prepare(run, progress=False)
    data = load_data(
        run, folder=folder, tokenizer=prepared_tokenizer(folder), data_rank=0, data_ranks=1, micro_samples=GLOBAL,
        eval_micro_samples=1,
    )  # fmt: skip
    for step in range(STEPS):
        (batch,) = data.train.step(step)
        yield batch


def plain_optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
    """The recipe's, matrices alone decayed."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)


def plain_steps(
    recipe: Path, parameters: Sequence[Any], loss_of: Callable[[int, dict[str, Tensor], Tensor], Tensor],
    after_backward: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:  # fmt: skip
    """(loss, gradient norm) of each step of a recipe of a constant rate.

    `loss_of` gives that of (step, what the model takes of the global batch, labels), a mean over labels.
    """
    optimizer = plain_optimizer([*parameters])
    history = []
    for step, batch in enumerate(whole_batches(recipe)):
        batch.pop("sample_ids", None)
        labels = batch.pop("labels")
        for group in optimizer.param_groups:
            group["lr"] = LR
        loss = loss_of(step, batch | {"use_cache": False}, labels)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        after_backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def load_plain(path: str | Path) -> Any:
    """The causal model of a folder, as the oracle computes it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").train()


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The plain loss."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_on_two_ranks(recipes: Iterable[Path]) -> None:
    """Train them, one after the other in one set of ranks."""
    run_ranks(2, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=900).check()


def plain_loop(recipe: Path, poison: Sequence[int] = ()) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step of a recipe that loads fp32 weights, computed in fp64.

    Steps whose samples have one of the tokens `poison` are (nan, nan), and change nothing.

    In fp32 the oracle's own rounding would be the larger part: 1e-5 of the norm for olmo2, by eager attention.
    """
    run = load(str(recipe))
    auto: Any = AutoModelForMaskedLM if run.task.kind == "masked-lm" else AutoModelForCausalLM
    model = auto.from_pretrained(run.model.path, dtype=torch.float64, attn_implementation="eager")
    model.config.use_cache = False
    model.train()
    optimizer = plain_optimizer([*model.parameters()])
    history = []
    for step, batch in enumerate(whole_batches(recipe)):
        if torch.isin(batch["input_ids"], torch.tensor(poison, dtype=torch.int64)).any():
            history.append((math.nan, math.nan))
            continue
        labels = batch.pop("labels")
        if "attention_mask" in batch:  # transformers' eager attention adds its mask
            seen = batch["attention_mask"]
            batch["attention_mask"] = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
        for group in optimizer.param_groups:
            group["lr"] = LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / STEPS)))
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def history_of(folder: Path, name: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step that the run wrote."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"]
