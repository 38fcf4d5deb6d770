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
CASES["dropped"] = DROPPED
CASES["dropped-repack"] = DROPPED | {"curriculum": SHORT, "model": {"activation_checkpointing": True}}
CASES["patch"] = {"patch": {"size": 4, "fraction": 0.6}}
LAYOUTS: dict[str, dict[int, dict[str, Any]]] = {
    "truncate": {2: {"pipeline": 2}, 4: {"zero_stage": 3}},
    "dropped-repack": {2: {"tensor": 2, "zero_stage": 1}, 4: {"pipeline": 2}},
    "patch": {2: {"sequence": 2, "zero_stage": 1}, 4: {"pipeline": 2, "tensor": 2}},
}
"""A sample: the layout of each number of ranks; one rank is compared with."""
SAMPLE = {1: tuple(LAYOUTS), 2: tuple(LAYOUTS), 4: ("patch",)}
ALL: tuple[dict[str, Any], ...] = (
    {"zero_stage": 0}, {"zero_stage": 3}, {"pipeline": 2}, {"pipeline": 4}, {"tensor": 2, "zero_stage": 3},
    {"pipeline": 2, "tensor": 2}, {"sequence": 2, "zero_stage": 3}, {"tensor": 2, "sequence": 2, "zero_stage": 0},
)  # fmt: skip


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "tokens", "samples", "sequence_length", "patch", "lr", "labels", "loss", "grad_norm")
    return [{key: record[key] for key in keys} for record in map(json.loads, lines) if record["kind"] == "train"]


def recipe(folder: Path, case: str, ranks: int, number: int, layout: dict[str, Any]) -> tuple[str, str]:
    """(run's name, path of the recipe)."""
    name = f"{case}-{ranks}-{number}"
    sections = CASES[case] | ({"checkpoint": {"every_steps": 5, "keep_last": 9}} if ranks == 2 else {})
    family = "gpt_neox" if layout.keys() >= {"tensor", "sequence"} else "llama"
    weights = folder / family
    if not weights.exists():
        write_weights(weights, family)
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    path = write_recipe(folder, name, corpus, weights, family, layout, **sections, batch={"micro_samples": 2})
    return name, str(path)


def compare(folder: Path, reference: str, other: str, case: str) -> None:
    expected = records(folder, reference)
    lengths, patches = ({record[key] for record in expected} for key in ("sequence_length", "patch"))
    assert len(lengths) >= (3 if "curriculum" in CASES[case] else 1)
    assert patches == ({1, 4} if "patch" in CASES[case] else {1})
    for here, there in zip(records(folder, other), expected, strict=True):
        for key, value in there.items():
            if key in ("loss", "grad_norm"):
                np.testing.assert_allclose(here[key], value, rtol=1e-5, err_msg=f"{other} {key} {there['step']}")
            else:
                assert here[key] == value, (other, key)


def test_the_clock_is_the_same_in_every_layout_and_after_a_stop(tmp_path: Path) -> None:
    recipes = {
        ranks: dict(recipe(tmp_path, case, ranks, 0, LAYOUTS[case].get(ranks, {})) for case in cases)
        for ranks, cases in SAMPLE.items()
    }
    for ranks, named in recipes.items():
        run_ranks(ranks, ["tests/parity/train_many.py", *named.values()], timeout_s=500).check()
    for ranks in (2, 4):
        for case in SAMPLE[ranks]:
            compare(tmp_path, f"{case}-1-0", f"{case}-{ranks}-0", case)
    unbroken = {name: records(tmp_path, name) for name in recipes[2]}
    for name in unbroken:  # what a crash after step 5 leaves
        for later in (tmp_path / "runs" / name / "checkpoints").glob("step-*"):
            if later.name != "step-00000005":
                shutil.rmtree(later)
    run_ranks(2, ["tests/parity/train_many.py", *recipes[2].values()], timeout_s=500).check()
    for name, expected in unbroken.items():
        assert records(tmp_path, name) == expected, name


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(CASES))
def test_every_layout_has_the_clock_and_the_losses_of_one_rank(case: str, tmp_path: Path) -> None:
    for number, layout in enumerate(ALL):
        if "sequence" in layout and "token_drop" in CASES[case]:
            continue
        one, path = recipe(tmp_path, case, 1, number, dict.fromkeys(layout, 1))
        run_ranks(1, ["tests/parity/train_many.py", path]).check()
        name, path = recipe(tmp_path, case, 4, number, layout)
        run_ranks(4, ["tests/parity/train_many.py", path]).check()
        compare(tmp_path, one, name, case)
