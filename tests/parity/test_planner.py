"""What the plan says a rank will hold is what the engine holds; `make planner` does so for all layouts of its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from plain_loop import history_of, write_corpus, write_recipe
from ranks import ROOT, run_ranks

from ds_train.engine.port import free_port

sys.path.append(str(ROOT / "benchmarks"))
from planner import EXACT, LAYOUTS, recipe

pytestmark = pytest.mark.parity

SAMPLE = ("zero1-bf16", "zero3", "tensor2")


def test_held_bytes_are_the_predicted_ones(tmp_path: Path) -> None:
    assert all(LAYOUTS[layout][0] == 2 for layout in SAMPLE)
    paths = [recipe(tmp_path, tmp_path / "cache", "llama", layout) for layout in SAMPLE]
    small = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 2048}
    for path in paths:
        tree = yaml.safe_load(path.read_text())
        tree["model"] |= small
        tree["batch"] = {"global_samples": 8, "micro_samples": 1}
        path.write_text(yaml.safe_dump(tree))
    arguments = [f"{path}={free_port()}" for path in paths]
    run_ranks(2, ["benchmarks/planner_worker.py", str(tmp_path / "out"), *arguments], timeout_s=400).check()
    for rank in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"out.{rank}").read_text().splitlines()]
        assert len(rows) == len(SAMPLE)
        for row in rows:
            for name in ("parameters", "gradients", "optimizer"):
                assert row["expected"][name] == pytest.approx(row["held"][name], rel=EXACT), (row["name"], name)


def test_auto_is_chosen_once_for_all_ranks_and_kept_when_the_run_goes_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    model = {"arch": "llama", "path": None, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 300, "tie_word_embeddings": False}  # fmt: skip
    fields = ("pipeline", "tensor", "sequence", "zero_stage", "offload_optimizer", "offload_params")
    recipe_path = write_recipe(
        tmp_path, "chosen", corpus, tmp_path, "llama", dict.fromkeys(fields, "auto"),
        model=model | {"activation_checkpointing": "auto"}, batch={"micro_samples": "auto"},
        checkpoint={"save_final": True}, schedule={"steps": 3},
    )  # fmt: skip
    env = {"DS_TRAIN_CALIBRATION": str(tmp_path / "none.json")}
    # Twice in one launch: what goes on does so in the layout of its folder.
    ended = run_ranks(2, ["tests/parity/train_many.py", str(recipe_path), str(recipe_path)], env=env).check()
    assert ended.outputs[0].count("predicted: ") == 2
    assert "continuing " in ended.outputs[0]
    run = tmp_path / "runs" / "chosen"
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert "auto" not in [written["parallel"][field] for field in fields]
    planned = json.loads((run / "plan.json").read_text())
    assert planned["predicted"]["fits"] is True
    assert len(history_of(tmp_path, "chosen")) == 3
