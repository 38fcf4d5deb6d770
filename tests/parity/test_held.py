"""What each rank holds is what the arithmetic of its layout says, counted in the running engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain_loop import write_corpus, write_recipe
from ranks import run_ranks

pytestmark = pytest.mark.parity

V, D, F, LAYERS, HEADS, GROUPS = 320, 64, 160, 8, 4, 2
MATRICES = 2 * D * D + 2 * D * D * GROUPS // HEADS + 3 * D * F
MODEL = {
    "arch": "llama", "path": None, "vocab_size": V, "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipe4": {"pipeline": 4, "stage_layers": [2, 2, 2, 2]},
    "pipe2-tensor2": {"pipeline": 2, "tensor": 2, "stage_layers": [4, 4]},
    "pipe2-data2": {"pipeline": 2, "stage_layers": [5, 3]},
    "tensor2-zero1": {"tensor": 2},
    "tensor2-zero3": {"tensor": 2, "zero_stage": 3},
    "sequence2-zero3": {"sequence": 2, "zero_stage": 3},
}


def expected_parameters(layout: dict[str, Any], rank: int) -> int:
    """Elements of the model's parameters that the rank's part has, before ZeRO."""
    pipe, tensor = layout.get("pipeline", 1), layout.get("tensor", 1)
    stage = rank * pipe // 4
    layers = layout.get("stage_layers", [LAYERS])[stage]
    held = layers * (MATRICES // tensor + 2 * D)
    if stage == 0:
        held += V * D // tensor
    if stage == pipe - 1:
        held += V * D // tensor + D
    return held


def test_ranks_hold_their_share(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    recipes = [
        str(write_recipe(tmp_path, name, corpus, tmp_path, "llama", layout, model=MODEL))
        for name, layout in LAYOUTS.items()
    ]
    ended = run_ranks(4, ["tests/parity/held.py", *recipes], timeout_s=600).check()
    whole = LAYERS * (MATRICES + 2 * D) + 2 * V * D + D
    for rank, output in enumerate(ended.outputs):
        lines = [json.loads(line.removeprefix("HELD ")) for line in output.splitlines() if line.startswith("HELD ")]
        held = {line["recipe"]: line for line in lines}
        for name, layout in LAYOUTS.items():
            own = expected_parameters(layout, rank)
            replicas = 4 // (layout.get("pipeline", 1) * layout.get("tensor", 1))
            partitioned = layout.get("zero_stage") == 3
            # ZeRO pads each parameter (stage 3) or group to a multiple of its ranks; stage 3 keeps small ones whole.
            slack = 0.02 * own
            assert partitioned or held[name]["parameters"] == own, name
            bytes_held = 4 * own / replicas if partitioned else 4 * own
            assert abs(held[name]["parameter_bytes"] - bytes_held) <= 4 * slack, (name, held[name])
            # fp32 masters and Adam's two moments, sharded over the ranks that have the same parameters.
            assert abs(held[name]["optimizer_bytes"] - 12 * own / replicas) <= 12 * slack, (name, held[name])
        assert held["pipe4"]["parameter_bytes"] < 0.3 * 4 * whole
