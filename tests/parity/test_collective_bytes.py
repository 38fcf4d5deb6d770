"""Bytes of each kind of collective in a step of the running engine are the planner's, as ranks grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain_loop import write_corpus, write_recipe
from ranks import run_ranks

from ds_train.config import load
from ds_train.plan.facts import Facts
from ds_train.plan.make import make_plan
from ds_train.plan.predict import Predictor, chosen
from ds_train.plan.topology import Cluster

pytestmark = pytest.mark.parity

MODEL = {
    "arch": "llama", "path": None, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0-fp32": {"zero_stage": 0},
    "zero1-fp32": {"zero_stage": 1},
    "zero1-bf16": {"zero_stage": 1},
    "zero2-bf16": {"zero_stage": 2},
    # So small a bucket that no weight stays between its uses.
    "zero3-bf16": {"zero_stage": 3, "bucket_elements": 2000},
    "sequence2-bf16": {"zero_stage": 1, "sequence": 2},
}
VECTORS = 9 * 64
"""Elements of the norms, which ZeRO-3 sends in messages that are too small to be counted."""


def recipes(folder: Path, ranks: int) -> dict[str, Path]:
    """Two micro-batches a step of each data rank, whatever their number."""
    corpus = write_corpus(folder / "corpus")
    made = {}
    for name, layout in LAYOUTS.items():
        sequence = layout.get("sequence", 1)
        if sequence <= ranks:
            batch = {"global_samples": 4 * ranks // sequence, "micro_samples": 2}
            made[name] = write_recipe(
                folder, name, corpus, folder, "llama", layout, model=MODEL, batch=batch, schedule={"steps": 3},
                precision={"dtype": name.rpartition("-")[2]},
            )  # fmt: skip
    return made


def expected(recipe: Path, ranks: int) -> dict[str, int]:
    run, cluster = load(recipe), Cluster(ranks, ranks, "cpu")
    plan = make_plan(run, cluster)
    predictor = Predictor.of(Facts(run, cluster))
    assert predictor is not None
    assert predictor.time is not None
    (share,) = predictor.memory.shares.stages(1, 1)
    return predictor.time.exchanged(share, chosen(run, plan.layout, plan.batch, plan.zero_stage))


@pytest.mark.parametrize("ranks", [2, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (1, 4, 8))])
def test_a_step_exchanges_what_the_planner_says(ranks: int, tmp_path: Path) -> None:
    made = recipes(tmp_path, ranks)
    ended = run_ranks(ranks, ["tests/parity/collective_bytes.py", *map(str, made.values())], timeout_s=600).check()
    for output in ended.outputs:
        lines = [json.loads(line.removeprefix("BYTES ")) for line in output.splitlines() if line.startswith("BYTES ")]
        counted = {line["recipe"]: line["steps"][-1] for line in lines}
        assert set(counted) == set(made)
        for name, recipe in made.items():
            wanted = expected(recipe, ranks)
            assert set(counted[name]) == set(wanted), name
            # ZeRO-3: the norms', in two micro-batches, forward and backward.
            slack = 4 * 2 * VECTORS if "zero3" in name else 0
            for kind, size in wanted.items():
                assert abs(counted[name][kind] - size) <= slack, (name, kind, counted[name], wanted)
