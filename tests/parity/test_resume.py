"""A run that is stopped goes on as if it never had been: bit-equal losses on the same layout, dropout included."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks, start_ranks, stop

pytestmark = pytest.mark.parity

STEPS, EVERY = 12, 4
LAYOUTS = {
    "zero0-fp32": ({"zero_stage": 0}, "fp32"),
    "zero1-bf16": ({"zero_stage": 1}, "bf16"),
    "zero2-fp32": ({"zero_stage": 2}, "fp32"),
    "zero2-cpu-bf16": ({"zero_stage": 2, "offload_optimizer": "cpu"}, "bf16"),
    "zero3-fp32": ({"zero_stage": 3}, "fp32"),
    "zero3-bf16": ({"zero_stage": 3}, "bf16"),
    "pipeline-fp32": ({"pipeline": 2}, "fp32"),
    "pipeline-bf16": ({"pipeline": 2}, "bf16"),
    "tensor-zero0-fp32": ({"tensor": 2, "zero_stage": 0}, "fp32"),
    "tensor-zero3-bf16": ({"tensor": 2, "zero_stage": 3}, "bf16"),
    "sequence-zero2-fp32": ({"sequence": 2, "zero_stage": 2}, "fp32"),
}
SAMPLE = (
    "zero0-fp32", "zero1-bf16", "zero2-cpu-bf16", "zero3-fp32", "pipeline-bf16", "tensor-zero3-bf16",
    "sequence-zero2-fp32",
)  # fmt: skip


def write_recipe(folder: Path, name: str, root: str, **changes: Any) -> Path:
    parallel, dtype = LAYOUTS[name]
    recipe = {
        "name": name,
        "seed": 4,
        "run_root": str(folder / root),
        # gpt2 has dropout: its draws must continue too.
        "model": {"arch": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2},
        "data": {
            "source": "text",
            "path": str(folder / "text"),
            "sequence_length": 32,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_samples": 8, "micro_samples": 2},
        "parallel": parallel,
        "precision": {"dtype": dtype},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": STEPS, "kind": "wsd"},
        "checkpoint": {"every_steps": EVERY, "keep_last": 10, "export": False},
        "track": {"peak_tflops": 1.0, "eval_every_steps": 5, "eval_samples": 6, "progress": False},
    }
    for key, value in changes.items():
        recipe[key] = value
    path = folder / f"{root}-{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def records(folder: Path, root: str, name: str) -> list[tuple[Any, ...]]:
    lines = (folder / root / name / "metrics.jsonl").read_text().splitlines()
    keys = ("kind", "step", "loss", "grad_norm", "lr", "tokens", "accuracy")
    found = [record for record in map(json.loads, lines) if record["kind"] != "resume"]
    return [tuple(record.get(key) for key in keys) for record in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(70):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"{number} squared is {number**2}. " * (1 + number % 7))
    return tmp_path


def check_resumed(folder: Path, layouts: Iterable[str]) -> None:
    """Runs that are broken after a checkpoint are at their end bit by bit those that weren't."""
    whole = [str(write_recipe(folder, name, "whole")) for name in layouts]
    run_ranks(2, ["tests/parity/train_many.py", *whole], timeout_s=600).check()
    for name in layouts:  # what a crash between step 4 and step 8 leaves behind
        source, target = folder / "whole" / name, folder / "broken" / name
        shutil.copytree(source / "checkpoints" / "step-00000004", target / "checkpoints" / "step-00000004")
        lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        (target / "metrics.jsonl").write_text("".join(lines[:7]) + '{"kind": "train", "st')
    broken = [str(write_recipe(folder, name, "broken")) for name in layouts]
    run_ranks(2, ["tests/parity/train_many.py", *broken], timeout_s=600).check()
    for name in layouts:
        expected = records(folder, "whole", name)
        assert len([line for line in expected if line[0] == "train"]) == STEPS
        assert records(folder, "broken", name) == expected, name


def test_a_resumed_run_is_bit_equal_to_an_unbroken_one_and_another_recipe_is_refused(folder: Path) -> None:
    check_resumed(folder, SAMPLE)
    other = write_recipe(folder, SAMPLE[0], "whole", seed=5)
    ended = run_ranks(2, ["launch/train.py", str(other)], settle_s=1)
    assert ended.codes[0] == 2
    assert "seed=5: the checkpoint was made with 4" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]


@pytest.mark.exhaustive
def test_every_layout_resumes_bit_by_bit(folder: Path) -> None:
    check_resumed(folder, LAYOUTS)


@pytest.mark.exhaustive
def test_a_killed_run_goes_on_from_its_newest_checkpoint(folder: Path) -> None:
    name = "zero2-fp32"
    whole, broken = write_recipe(folder, name, "whole"), write_recipe(folder, name, "broken")
    run_ranks(2, ["tests/parity/train_many.py", str(whole)]).check()
    processes = start_ranks(2, ["launch/train.py", str(broken)])
    metrics = folder / "broken" / name / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > EVERY + 1):
            assert time.monotonic() < deadline, "the run never came past its first checkpoint"
            time.sleep(0.01)
    finally:
        stop(processes)  # SIGKILL
    run_ranks(2, ["launch/train.py", str(broken)]).check()
    assert records(folder, "broken", name) == records(folder, "whole", name)
