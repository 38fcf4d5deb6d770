"""Schedules on the clock: the same at 1, 2 and 4 ranks, and resumed in the middle of each bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_loop import write_corpus, write_recipe, write_weights
from ranks import run_ranks

pytestmark = pytest.mark.parity

SHORT = {"kind": "discrete", "lengths": [12, 24], "until": [0.3, 0.6]}
CASES: dict[str, dict[str, Any]] = {
    "repack": {"curriculum": SHORT, "schedule": {"kind": "cosine-restarts", "cycles": 3}},
    "truncate": {
        "curriculum": {"kind": "linear", "start_length": 16, "how": "truncate", "keep_tokens": False, "fraction": 0.7},
        "schedule": {"steps": None, "tokens": 8 * 48 * 8, "kind": "wsd", "cooldown_fraction": 0.2},
    },
}
DROPPED = {"token_drop": {"kind": "random-ltd", "multiple": 4, "fraction": 0.8}}
CASES["dropped"] = DROPPED | {"model": {"activation_checkpointing": True}}
CASES["dropped-repack"] = DROPPED | {"curriculum": SHORT}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"pipeline": 2}, {"sequence": 2, "zero_stage": 2}],
    4: [{"pipeline": 2, "tensor": 2}, {"zero_stage": 3}],
}


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "tokens", "samples", "sequence_length", "lr", "labels", "loss", "grad_norm")
    return [{key: record[key] for key in keys} for record in map(json.loads, lines) if record["kind"] == "train"]


def test_the_clock_is_the_same_in_every_layout_and_after_a_stop(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    names: dict[str, list[str]] = {}
    for ranks, layouts in LAYOUTS.items():
        recipes = []
        for case, sections in CASES.items():
            for number, layout in enumerate(layouts):
                if "sequence" in layout and "token_drop" in sections:
                    layout = {"tensor": 2, "zero_stage": 1}
                name = f"{case}-{ranks}-{number}"
                names.setdefault(case, []).append(name)
                saved = {"checkpoint": {"every_steps": 5, "keep_last": 9}} if ranks == 2 else {}
                batch = {"batch": {"micro_samples": 2}}
                recipes.append(
                    write_recipe(tmp_path, name, corpus, weights, "llama", layout, **sections, **saved, **batch)
                )
        run_ranks(ranks, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=500).check()
    for case, (first, *others) in names.items():
        expected = records(tmp_path, first)
        lengths = {record["sequence_length"] for record in expected}
        assert len(lengths) >= (3 if "curriculum" in CASES[case] else 1), case
        for other in others:
            found = records(tmp_path, other)
            for here, there in zip(found, expected, strict=True):
                for key, value in there.items():
                    if key in ("loss", "grad_norm"):
                        np.testing.assert_allclose(here[key], value, rtol=1e-5, err_msg=f"{other} {key}")
                    else:
                        assert here[key] == value, (other, key)
    stopped = {name: records(tmp_path, name) for case in names for name in names[case] if "-2-" in name}
    for name in stopped:  # what a crash after step 5 or later leaves
        folder = tmp_path / "runs" / name / "checkpoints"
        for later in folder.glob("step-*"):
            if later.name != "step-00000005":
                shutil.rmtree(later)
    again = [str(tmp_path / f"{name}.yaml") for name in stopped]
    run_ranks(2, ["tests/parity/train_many.py", *again], timeout_s=500).check()
    for name, expected in stopped.items():
        assert records(tmp_path, name) == expected, name
