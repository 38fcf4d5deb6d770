"""A checkpoint of any layout goes on in any other one: its losses are those of the unbroken run, and no bit of a
weight or of an optimizer's state is another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks

from ds_train.checkpoint.native import open_fragments, read_state

pytestmark = pytest.mark.parity

STEPS, SAVED = 8, 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank": (1, {"zero_stage": 0}),
    "zero0": (2, {"zero_stage": 0}),
    "zero2-offload": (2, {"zero_stage": 2, "offload_optimizer": "cpu"}),
    "zero3": (2, {"zero_stage": 3}),
    "pipeline": (2, {"pipeline": 2, "zero_stage": 1}),
    "tensor": (2, {"tensor": 2, "zero_stage": 1}),
    "tensor-sequence": (4, {"tensor": 2, "sequence": 2, "zero_stage": 2}),
    "pipeline-tensor": (4, {"pipeline": 2, "tensor": 2, "zero_stage": 1}),
}
SAMPLE = [
    ("zero3", "zero2-offload"), ("zero3", "pipeline"), ("zero3", "tensor"), ("zero3", "one-rank"),
    ("pipeline", "zero3"), ("tensor", "zero3"),
]  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # Grouped queries, and embedding and head that share a weight.
    "llama": {
        "arch": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    # Three matrices side by side, biases, dropout.
    "gpt2": {"arch": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip


def write_recipe(folder: Path, root: str, layout: str, model: str, **changes: Any) -> Path:
    recipe = {
        "name": layout,
        "run_root": str(folder / root),
        "model": MODELS[model],
        "data": {
            "source": "text",
            "path": str(folder / "text"),
            "sequence_length": 32,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_samples": 8, "micro_samples": 2},
        "parallel": LAYOUTS[layout][1],
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": STEPS, "kind": "cosine"},
        "checkpoint": {"every_steps": SAVED, "keep_last": 10, "export": False, "save_final": False},
        "track": {"peak_tflops": 1.0, "progress": False},
    }
    path = folder / f"{root}-{layout}.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def losses(folder: Path, root: str, layout: str) -> list[float]:
    lines = (folder / root / layout / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def run_each(folder: Path, script: str, ranks: int, arguments: list[str]) -> None:
    run_ranks(ranks, [f"tests/parity/{script}", *arguments], timeout_s=600).check()


def check_pairs(folder: Path, model: str, pairs: list[tuple[str, str]], **changes: Any) -> None:
    """Save on the first layout of each pair, go on on the second; compare losses, weights and states of all."""
    apart: list[str] = []
    sources = sorted({source for source, _ in pairs})
    for ranks in sorted({LAYOUTS[source][0] for source in sources}):
        recipes = [
            str(write_recipe(folder, "whole", source, model, **changes))
            for source in sources
            if LAYOUTS[source][0] == ranks
        ]
        run_each(folder, "train_many.py", ranks, recipes)
    saved = {source: folder / "whole" / source / "checkpoints" / f"step-{SAVED:08d}" for source in sources}
    for ranks in sorted({LAYOUTS[target][0] for _, target in pairs}):
        words: list[str] = []
        for source, checkpoint in saved.items():
            here = [target for other, target in pairs if other == source and LAYOUTS[target][0] == ranks]
            recipes = [str(write_recipe(folder, f"from-{source}", target, model, **changes)) for target in here]
            words += ["--", str(checkpoint), *recipes]
        run_each(folder, "go_on.py", ranks, words)
    for source, target in pairs:
        root = f"from-{source}"
        expected = torch.tensor(losses(folder, "whole", source)[SAVED:])
        found = torch.tensor(losses(folder, root, target))
        furthest = float(((found - expected).abs() / expected).max())
        print(f"{model}, {source} to {target}: losses at most {furthest:.1e} apart")
        if not furthest <= 1e-5:
            apart.append(f"{source} to {target}: {furthest:.1e}, {found.tolist()} instead of {expected.tolist()}")
        same_states(saved[source], next((folder / root / target / "resaved").glob("step-*")))
    assert not apart, "\n".join(apart)


def same_states(one: Path, other: Path) -> None:
    assert read_state(one).known == read_state(other).known
    saved, again = open_fragments(one), open_fragments(other)
    assert saved.shapes.keys() == again.shapes.keys()
    assert saved.kinds == again.kinds
    for name in saved.shapes:
        for kind in ("weight", *saved.kinds):
            assert torch.equal(saved.whole(name, kind), again.whole(name, kind)), (name, kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(70):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"{number} squared is {number**2}. " * (1 + number % 7))
    return tmp_path


def test_a_run_goes_on_in_other_layouts(folder: Path) -> None:
    check_pairs(folder, "llama", SAMPLE)


@pytest.mark.exhaustive
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_goes_on_in_every_other(folder: Path, model: str, source: str) -> None:
    check_pairs(folder, model, [(source, target) for target in LAYOUTS if target != source])


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_every_optimizer_goes_on(folder: Path, optimizer: str) -> None:
    pairs = [("zero3", "pipeline-tensor"), ("pipeline-tensor", "zero2-offload"), ("tensor", "one-rank")]
    check_pairs(folder, "llama", pairs, optimizer={"kind": optimizer, "lr": 1e-3})
