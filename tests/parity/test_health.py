"""Poison in the data: a step that isn't finite changes nothing, in any layout, and its origin is named; a spike is
rolled back; the documents of a step are those that the model was given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import GLOBAL, STEPS, plain_loop, write_corpus, write_recipe, write_weights
from poisoned import BROKEN, NAN, NAN_GRADIENT
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from ds_train.data.ledger import explain_step

pytestmark = pytest.mark.parity

TORCH = {"optimizer": {"kernel": "torch"}}
BF16 = {"precision": {"dtype": "bf16"}}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero0": ({"zero_stage": 0}, {}),
    "zero0-torch": ({"zero_stage": 0}, TORCH),
    "zero1-bf16": ({"zero_stage": 1}, BF16),
    "zero2": ({"zero_stage": 2}, {}),
    "zero2-cpu-bf16": ({"zero_stage": 2, "offload_optimizer": "cpu"}, BF16),
    "zero3-cpu": ({"zero_stage": 3, "offload_optimizer": "cpu"}, {}),
    "zero3-bf16": ({"zero_stage": 3}, BF16),
    "pipeline": ({"pipeline": 2, "stage_layers": [2, 2]}, {}),  # what is broken is the second stage's
    "pipeline-bf16": ({"pipeline": 2}, BF16),
    "tensor-zero0": ({"tensor": 2, "zero_stage": 0}, {}),
    "tensor-zero3-bf16": ({"tensor": 2, "zero_stage": 3}, BF16),
    "sequence-zero2": ({"sequence": 2, "zero_stage": 2}, {}),
}
SAMPLE = ("zero0", "zero1-bf16", "zero3-cpu", "pipeline-bf16", "tensor-zero0")
FEEDS: dict[str, dict[str, Any]] = {
    "best-fit": {"data": {"packing_by": "best-fit"}},
    "padding-free": {"data": {"packing": False, "padding_free": True}},
    "curriculum": {"curriculum": {"kind": "discrete", "lengths": [12], "until": [0.5], "keep_tokens": True}},
}


def poisoned_corpus(folder: Path) -> Path:
    corpus = write_corpus(folder)
    (corpus / "000a.txt").write_text(f"alpha {chr(NAN)} be " * 3)
    (corpus / "012a.txt").write_text(f"zeta {chr(NAN_GRADIENT)} be " * 3)
    return corpus


def records(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def rows_fed(folder: Path, name: str, ranks: int) -> list[list[list[int]]]:
    """Token rows that the embeddings of all ranks were given, by step."""
    files = [folder / "runs" / name / f"fed-{rank}.jsonl" for rank in range(ranks)]
    fed = [list(map(json.loads, file.read_text().splitlines())) for file in files]
    each = len(fed[0]) // STEPS
    by_step = [[own[step * each : (step + 1) * each] for own in fed] for step in range(STEPS)]
    return [[row for own in step for micro in own for row in micro] for step in by_step]


def tokens_of(portions: list[dict[str, Any]]) -> list[int]:
    """The tokens of portions of documents, from the text files themselves."""
    return [
        token
        for portion in portions
        for token in [*Path(portion["source"]).read_bytes(), 256][portion["start"] : portion["stop"]]
    ]


def samples_told(folder: Path, name: str, step: int) -> list[list[int]]:
    portions = explain_step(folder / "runs" / name, step)["documents"]
    numbers = sorted({portion["sample"] for portion in portions})
    return [tokens_of([portion for portion in portions if portion["sample"] == number]) for number in numbers]


def check_skips(tmp_path: Path, layouts: list[str], more: list[str]) -> None:
    corpus, weights = poisoned_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    recipes = {
        name: write_recipe(tmp_path, name, corpus, weights, "llama", LAYOUTS[name][0], **LAYOUTS[name][1])
        for name in layouts
    }
    for name in more:
        health = {"health": {"max_nonfinite_steps": 2}} if name.startswith("broken") else FEEDS[name]
        layout = LAYOUTS[name.removeprefix("broken-")][0] if name.startswith("broken") else {"zero_stage": 2}
        recipes[name] = write_recipe(tmp_path, name, corpus, weights, "llama", layout, **health)
    run_ranks(2, ["tests/parity/poisoned.py", *map(str, recipes.values())], timeout_s=600).check()
    expected = plain_loop(recipes[layouts[0]], poison=(NAN, NAN_GRADIENT))
    poisoned = [step for step, (loss, _) in enumerate(expected, 1) if math.isnan(loss)]
    assert len(poisoned) == 2, "the two poisons are in steps of their own"
    for name in layouts:
        found = records(tmp_path, name, "train")
        assert [record["step"] for record in found if not record["applied"]] == poisoned, name
        for rank in range(2):
            kept = (tmp_path / "runs" / name / f"kept-{rank}.jsonl").read_text().splitlines()
            assert kept == ["true"] * 2, name
        assert [record["step"] for record in records(tmp_path, name, "health")] == poisoned
        finite = [place for place in range(STEPS) if place + 1 not in poisoned]
        here = [(found[place]["loss"], found[place]["grad_norm"]) for place in finite]
        tolerance = 2e-2 if "bf16" in name else 1e-5
        np.testing.assert_allclose(here, [expected[place] for place in finite], rtol=tolerance, err_msg=name)
    for name in more:
        if name.startswith("broken"):
            check_diagnosis(tmp_path, name)
        else:
            check_feed(tmp_path, name)
    check_feed(tmp_path, next(name for name in layouts if name.startswith("zero")))


def check_diagnosis(folder: Path, name: str) -> None:
    (line,) = [record for record in records(folder, name, "health") if record["event"] == "stopped"]
    assert (line["step"], line["verdict"]) == (2, "non-finite")
    assert (line["module"], line["module_class"], line["tensor"]) == (BROKEN, "Linear", "its output")
    assert (line["phase"], line["rows"], line["rank"]) == ("forward", [0], 1)
    # The tokens of row 0 of the first micro-batch of step 2, where the last data rank's first stage was given them:
    # counted from the end, where step 2 is done again, since a look-alike's embedding was given others before step 1.
    file, each = ("fed-0.jsonl", GLOBAL) if "pipeline" in name else ("fed-1.jsonl", GLOBAL // 2)
    fed = list(map(json.loads, (folder / "runs" / name / file).read_text().splitlines()))
    assert fed[-2 * each :][:each] == fed[-each:]
    assert tokens_of(line["documents"]) == fed[-2 * each][0]


def check_feed(folder: Path, name: str) -> None:
    for step, rows in enumerate(rows_fed(folder, name, 2), 1):
        told = samples_told(folder, name, step)
        if name == "padding-free":  # micro-batches of one sample, padded to multiples of 8
            rows = [row[: row.index(256) + 1] if 256 in row else row for row in rows]
        if name == "best-fit":
            told = [sample + [257] * (48 - len(sample)) for sample in told]
        assert sorted(told) == sorted(rows), (name, step)


def test_a_step_that_is_not_finite_changes_nothing_and_its_origin_is_named(tmp_path: Path) -> None:
    check_skips(tmp_path, list(SAMPLE), ["broken-pipeline", "broken-zero2", *FEEDS])


@pytest.mark.exhaustive
def test_no_layout_lets_poison_into_the_weights(tmp_path: Path) -> None:
    broken = [f"broken-{name}" for name in LAYOUTS]
    check_skips(tmp_path, list(LAYOUTS), [*broken, *FEEDS])


@pytest.mark.exhaustive
def test_a_teacher_that_breaks_is_named(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    teacher = AutoModelForCausalLM.from_pretrained(weights)
    teacher.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    teacher.save_pretrained(tmp_path / "teacher")
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "logits-zero2": ("zero2", {"logits": "js"}),
        "hidden-pipeline": ("pipeline", {"hidden": 0.5}),
        "sharded-zero3": ("zero3-cpu", {"logits": "js", "placement": "sharded"}),
    }
    recipes = [
        write_recipe(
            tmp_path, name, corpus, weights, "llama", LAYOUTS[layout][0], health={"max_nonfinite_steps": 2},
            compress={"distill": {"teacher": str(tmp_path / "teacher"), **section}},
        )
        for name, (layout, section) in cases.items()
    ]  # fmt: skip
    run_ranks(2, ["tests/parity/poisoned.py", *map(str, recipes)], timeout_s=600).check()
    for name in cases:
        (line,) = [record for record in records(tmp_path, name, "health") if record["event"] == "stopped"]
        assert (line["of_teacher"], line["module"]) == (True, "model.layers.1.mlp.down_proj"), name
        assert (line["tensor"], line["phase"]) == ("its parameter weight", "forward"), name
