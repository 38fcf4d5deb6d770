"""The range test on the engine: each part starts from the same state, and the command answers with a value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plain_loop import write_corpus, write_recipe, write_weights
from ranks import ROOT, clean_environment, run_ranks

pytestmark = pytest.mark.parity

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero0": ({"zero_stage": 0}, "fp32"),
    "zero1-bf16": ({"zero_stage": 1}, "bf16"),
    "zero2": ({"zero_stage": 2}, "fp32"),
    "zero3-bf16": ({"zero_stage": 3}, "bf16"),
    "pipeline": ({"pipeline": 2}, "fp32"),
    "tensor": ({"tensor": 2, "zero_stage": 2}, "fp32"),
}


SAMPLE = ("zero1-bf16", "zero3-bf16", "pipeline", "tensor")


@pytest.mark.parametrize("layouts", [SAMPLE, pytest.param(tuple(LAYOUTS), marks=pytest.mark.exhaustive)], ids=len)
def test_every_part_starts_from_the_same_state(layouts: tuple[str, ...], tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    recipes = [
        str(write_recipe(tmp_path, name, corpus, weights, "llama", layout, precision={"dtype": dtype}))
        for name, (layout, dtype) in ((name, LAYOUTS[name]) for name in layouts)
    ]
    ended = run_ranks(2, ["tests/parity/range_losses.py", *recipes], timeout_s=400).check()
    for output in ended.outputs:
        lines = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("LOSSES ")]
        assert len(lines) == len(layouts)
        for line in lines:
            first, high, again = line["parts"]
            assert first == again, line["name"]
            assert high[0] == first[0], line["name"]
            assert high[1:4] != first[1:], line["name"]
            assert line["left"] == [], "nothing of the model is kept"


def test_the_command_names_a_rate_and_leaves_its_record(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    recipe = write_recipe(tmp_path, "find", corpus, weights, "llama", {"zero_stage": 1})
    command = [sys.executable, "-m", "ds_train.cli", "lr-find", str(recipe), "--ranks", "2"]
    options = ["--steps", "20", "--probe-steps", "10", "--lowest", "1e-3", "--highest", "3"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=ROOT, env=clean_environment(), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "find"
    record = json.loads((folder / "lr-find.json").read_text())
    assert f"optimizer.lr={record['value']:.3g}: training is stable" in done.stdout
    ends = {probe["rate"]: probe["end"] for probe in record["probes"] if probe["stable"]}
    assert record["value"] == min(ends, key=ends.__getitem__) <= record["largest_stable"] / 1.25
    assert record["ranks"] == 2
    assert (folder / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["lr-find.json", "lr-find.png"]
    refused = subprocess.run([*command, "--proxy-width", "16"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert refused.returncode != 0
    assert "only a model from scratch" in refused.stderr + refused.stdout
