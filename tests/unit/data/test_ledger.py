"""What a step is said to have trained on is what it was given: tokens of the text files against the batches."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_train.checkpoint.manifest import write_json
from ds_train.config import RunConfig, dump
from ds_train.data.build import load_data
from ds_train.data.ledger import data_record, explain_step
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.errors import UserError
from ds_train.schedule.timeline import make_timeline

Recipe = Callable[..., RunConfig]
PAD, MASK, STEPS, GLOBAL = 257, 258, 12, 4
MODES: dict[str, dict[str, Any]] = {
    "stream": {},
    "first-fit": {"data": {"packing_by": "first-fit"}},
    "best-fit": {"data": {"packing_by": "best-fit"}},
    "padded": {"data": {"packing": False}},
    "padding-free": {"data": {"packing": False, "padding_free": True}},
    "masked": {"task": {"kind": "masked-lm"}, "model": {"arch": "bert", "hidden_size": 32}},
    "repacked": {"curriculum": {"kind": "discrete", "lengths": [8, 16], "until": [0.3, 0.6]}},
    "truncated": {"curriculum": {"kind": "linear", "start_length": 8, "multiple": 8, "how": "truncate"}},
    "more-samples": {"curriculum": {"kind": "discrete", "lengths": [8], "until": [0.5], "keep_tokens": True}},
    "patches": {"patch": {"size": 4, "fraction": 0.5}},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    random = np.random.default_rng(11)
    (tmp_path / "text").mkdir()
    for number in range(60):
        text = "".join(random.choice(list("abcdefgh \n"), size=int(random.integers(1, 90))))
        (tmp_path / "text" / f"{number:02d}.txt").write_text(text)
    return tmp_path


def started(recipe: Recipe, **sections: Any) -> tuple[RunConfig, Path, Any]:
    """A recipe, its run folder as a run leaves it, and the batches of its only rank."""
    sections = {"schedule": {"steps": None, "tokens": 32 * GLOBAL * STEPS}, **sections}
    data = {"sequence_length": 32, "validation_fraction": 0.0} | sections.pop("data", {})
    run = recipe(data=data, batch={"global_samples": GLOBAL}, **sections)
    folder, prepared = Path(run.run_root) / run.name, prepare(run)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(run))
    write_json(folder / "data.json", data_record(prepared, []))
    bundle = load_data(
        run, folder=prepared, tokenizer=prepared_tokenizer(prepared), data_rank=0, data_ranks=1, micro_samples=1,
        eval_micro_samples=1,
    )  # fmt: skip
    return run, folder, bundle


def tokens_of(explained: dict[str, Any]) -> list[int]:
    """All tokens that a step is said to have, from the text files themselves, in order."""
    found = []
    for portion in explained["documents"]:
        document = [*Path(portion["source"]).read_bytes(), 256]
        digest = hashlib.sha256(np.array(document, dtype="<i8").tobytes()).hexdigest()
        assert portion["sha256"] == digest
        found += document[portion["start"] : portion["stop"]]
    return found


def tokens_given(batches: list[dict[str, torch.Tensor]], masked: bool = False) -> list[int]:
    """All tokens of the micro-batches but padding; hidden ones by their labels."""
    found: list[int] = []
    for batch in batches:
        tokens, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
            tokens = tokens[batch["attention_mask"].flatten().bool()]
        if masked:
            tokens = torch.where(labels != -100, labels, tokens)
        found += tokens[tokens != PAD].tolist()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_documents_of_a_step_are_those_that_it_was_given(recipe: Recipe, corpus: Path, mode: str) -> None:
    run, folder, bundle = started(recipe, **MODES[mode])
    timeline = make_timeline(run, bundle.samples_per_epoch)
    for step in range(0, timeline.steps, 5):
        explained, shape = explain_step(folder, step + 1), timeline.at(step)
        assert tokens_of(explained) == tokens_given(bundle.train.take(shape), mode == "masked"), step
        assert (explained["sequence_length"], explained["samples"]) == (shape.length, shape.samples)
        assert (explained["tokens_before"], explained["tokens_after"]) == (shape.before, shape.after)


def test_roll_backs_are_known_and_can_be_looked_behind(recipe: Recipe, corpus: Path) -> None:
    run, folder, bundle = started(recipe)
    plain = make_timeline(run, bundle.samples_per_epoch)
    skipping = plain.skipping(4, 7)
    write_json(folder / "data.json", data_record(prepare(run), skipping.skips))
    for step in (0, 3, 4, 6, 11):
        after, before = explain_step(folder, step + 1), explain_step(folder, step + 1, rollbacks=0)
        assert tokens_of(after) == tokens_given(bundle.train.take(skipping.at(step)))
        assert tokens_of(before) == tokens_given(bundle.train.take(plain.at(step)))
        assert (after == before) == (step < 4)


def test_prepared_data_is_found_again_where_it_is_now(recipe: Recipe, corpus: Path) -> None:
    run, folder, _ = started(recipe)
    expected = explain_step(folder, 3)
    prepared = prepare(run)
    prepared.rename(prepared.with_name("moved"))
    assert explain_step(folder, 3) == expected
    record = json.loads((folder / "data.json").read_text())
    write_json(folder / "data.json", record | {"content": "another"})
    with pytest.raises(UserError, match="neither in"):
        explain_step(folder, 3)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is missing"):
        explain_step(folder, 3)


def test_steps_that_a_run_does_not_have_are_refused(recipe: Recipe, corpus: Path) -> None:
    _, folder, _ = started(recipe)
    for step in (0, STEPS + 1):
        with pytest.raises(UserError, match=f"step={step}: the run has no such step. Fix: 1 to {STEPS}"):
            explain_step(folder, step)


def test_epochs_are_counted(recipe: Recipe, corpus: Path) -> None:
    _, folder, bundle = started(recipe, schedule={"steps": 200})
    step = bundle.samples_per_epoch // GLOBAL + 2
    assert (explain_step(folder, 1)["epoch"], explain_step(folder, step)["epoch"]) == (0, 1)
