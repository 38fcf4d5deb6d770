"""What the plan says a rank will hold is what the engine holds; `make planner` does so for all layouts of its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ranks import ROOT, run_ranks

from ds_train.engine.port import free_port

sys.path.append(str(ROOT / "benchmarks"))
from planner import EXACT, LAYOUTS, recipe

pytestmark = pytest.mark.parity

SAMPLE = ("zero1-bf16", "zero3", "tensor2")


def test_held_bytes_are_the_predicted_ones(tmp_path: Path) -> None:
    paths = [recipe(tmp_path, tmp_path / "cache", "llama", layout) for layout in SAMPLE]
    assert all(LAYOUTS[layout][0] == 2 for layout in SAMPLE)
    arguments = [f"{path}={free_port()}" for path in paths]
    run_ranks(2, ["benchmarks/planner_worker.py", str(tmp_path / "out"), *arguments], timeout_s=400).check()
    for rank in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"out.{rank}").read_text().splitlines()]
        assert len(rows) == len(SAMPLE)
        for row in rows:
            for name in ("parameters", "gradients", "optimizer"):
                assert row["expected"][name] == pytest.approx(row["held"][name], rel=EXACT), (row["name"], name)
