"""A sample that makes the loss leap: the run goes back, leaves it out, and ends where one without that sample ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import write_corpus, write_recipe, write_weights
from poisoned import HUGE, NAN
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from ds_train.checkpoint.fragments import Shape
from ds_train.checkpoint.native import open_fragments
from ds_train.data.ledger import explain_step

pytestmark = pytest.mark.parity

STEPS, SHORT, EVERY = 100, 24, 4
SPIKES = (14, 79)
PROMPT = "alpha be"
WORDS = (
    "alpha", "be", "gamma", "ray", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi",
)  # fmt: skip
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero0": ({"zero_stage": 0}, "fp32"),
    "zero1-bf16": ({"zero_stage": 1}, "bf16"),
    "zero2-cpu": ({"zero_stage": 2, "offload_optimizer": "cpu"}, "fp32"),
    "zero3-cpu-bf16": ({"zero_stage": 3, "offload_optimizer": "cpu"}, "bf16"),
    "zero3": ({"zero_stage": 3}, "fp32"),
    "pipeline": ({"pipeline": 2}, "fp32"),
    "pipeline-bf16": ({"pipeline": 2}, "bf16"),
    "tensor-zero2": ({"tensor": 2, "zero_stage": 2}, "fp32"),
    "sequence-zero1": ({"sequence": 2, "zero_stage": 1}, "fp32"),
}
SAMPLE = ("zero1-bf16", "zero3", "pipeline")


def write_chains(folder: Path, count: int, seed: int) -> Path:
    """Documents of words that follow from one another up to a draw, so that there is something to learn."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        at, text = int(random.integers(len(WORDS))), []
        for _ in range(40):
            text.append(WORDS[at])
            at = (at * 7 + int(random.integers(3))) % len(WORDS)
        (folder / f"{number:04d}.txt").write_text(" ".join(text))
    return folder


class Runs:
    """Recipes on data with two poisoned documents, which come in steps `SPIKES`, or harmless ones in their place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, write_weights(folder / "llama", "llama")
        self.clean, self.held_out = write_chains(folder / "clean", 400, 1), write_chains(folder / "held-out", 40, 2)
        self.poisoned, self.nonfinite = (
            Path(shutil.copytree(self.clean, folder / name)) for name in ("poisoned", "nonfinite")
        )
        for name in ("0003a", "0083a"):
            (self.poisoned / f"{name}.txt").write_text(f"{chr(HUGE)} be " * 6)
            (self.nonfinite / f"{name}.txt").write_text(f"{chr(NAN)} be " * 6)
            # As long, so that all else lies in the same windows, in the same order: another order alone ends 3 % off.
            (self.clean / f"{name}.txt").write_text("alpha " * 5)

    def recipe(self, name: str, layout: str, steps: int, corpus: Path, **sections: Any) -> str:
        parallel, dtype = LAYOUTS[layout]
        sections = {
            "data": {"validation_path": str(self.held_out)},
            "batch": {"micro_samples": 4, "global_samples": 16},
            "precision": {"dtype": dtype},
            "optimizer": {"lr": 1.2e-2},
            "schedule": {"steps": steps, "kind": "cosine", "warmup_fraction": 0.1},
            "health": {"on_spike": "roll-back", "spike_window": 10},
            "checkpoint": {"every_steps": EVERY, "keep_last": 100},
            "track": {"eval_samples": 300, "progress": False, "peak_tflops": 1.0},
        } | sections
        return str(write_recipe(self.folder, name, corpus, self.weights, "llama", parallel, **sections))

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return list(map(json.loads, lines))

    def history(self, name: str) -> list[tuple[int, float, float]]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.of_kind(name, "train")]

    def of_kind(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records(name) if record["kind"] == kind]


def check_going_on(runs: Runs, layouts: list[str], longer: Sequence[str] = (), again: Sequence[str] = ()) -> None:
    """After a roll-back in the same process a run is bit by bit what a new process makes of that checkpoint."""
    recipes = [runs.recipe(name, name, SHORT, runs.poisoned) for name in layouts]
    run_ranks(2, ["tests/parity/poisoned.py", *longer, *recipes], timeout_s=900).check()
    resumes = list(again)
    for name in layouts:
        (line,) = runs.of_kind(name, "health")
        assert (line["event"], line["step"], line["spike_step"], line["windows"]) == ("roll-back", 12, 14, 32), name
        target = runs.folder / "runs" / f"{name}-again" / "checkpoints" / "step-00000012"
        shutil.copytree(runs.folder / "runs" / name / "checkpoints" / "step-00000012", target)
        resumes.append(runs.recipe(f"{name}-again", name, SHORT, runs.poisoned))
    run_ranks(2, ["tests/parity/poisoned.py", *resumes], timeout_s=600).check()
    for name in layouts:
        whole, resumed = runs.history(name), runs.history(f"{name}-again")
        assert [step for step, *_ in whole] == list(range(1, SHORT + 1))
        assert resumed == whole[12:], name


def best_recipe(runs: Runs) -> str:
    """A run whose held-out texts are of another kind than its own: it gets better at them, and then worse."""
    other = write_corpus(runs.folder / "other") if not (runs.folder / "other").exists() else runs.folder / "other"
    return runs.recipe(
        "best", "zero3", STEPS, runs.clean,
        data={"validation_path": str(other)},
        checkpoint={"best": "loss", "patience": 3, "every_steps": 10, "keep_last": 1, "export": True},
        track={"eval_every_steps": 4, "eval_samples": 32, "eval_prompts": [PROMPT], "sample_tokens": 12},
        health={"on_spike": "note"},
    )  # fmt: skip


def check_best(runs: Runs) -> None:
    scores = {line["step"]: line["loss"] for line in runs.of_kind("best", "eval")}
    best, last = min(scores, key=lambda step: scores[step]), max(scores)
    assert last == best + 12 < STEPS
    assert [line["step"] for line in runs.of_kind("best", "eval") if line["best"]][-1] == best
    (end,) = runs.of_kind("best", "health")
    assert (end["event"], end["step"], end["best_step"], end["best"]) == ("stopped-early", last, best, scores[best])
    folder = runs.folder / "runs" / "best"
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (best, last - last % 10)]
    # What is exported is the best model: it scores as it did, and says what it said.
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    weights = open_fragments(folder / "checkpoints" / kept[0])
    for name, parameter in model.named_parameters():
        shape = Shape(tuple(parameter.shape), None, 1)
        expected = weights.read(name, "weight", shape, 0, 0, parameter.numel())
        assert torch.equal(parameter.detach().flatten(), expected), name
    (said,) = [line["text"] for line in runs.of_kind("best", "sample") if line["step"] == best]
    tokens = torch.tensor([list(PROMPT.encode())])
    given = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=257)[0, len(PROMPT) :]
    assert said.encode() == bytes(token for token in given.tolist() if token < 256)


def is_poisoned(portion: dict[str, Any]) -> bool:
    """Whether this part of a document has the label; the rest of it may lie in another window."""
    return HUGE in Path(portion["source"]).read_bytes()[portion["start"] : portion["stop"]]


def check_end(runs: Runs) -> None:
    ends = {name: runs.of_kind(name, "eval")[-1]["loss"] for name in ("clean", "back", "skipped")}
    lines = runs.of_kind("back", "health")
    assert [line["spike_step"] for line in lines if line["event"] == "roll-back"] == list(SPIKES)
    assert abs(ends["back"] / ends["clean"] - 1.0) < 0.02, ends
    assert abs(ends["skipped"] / ends["clean"] - 1.0) < 0.02, ends
    # The second one comes two steps later where the first one rolled nothing back.
    assert [line["step"] for line in runs.of_kind("skipped", "health")] == [SPIKES[0], SPIKES[1] + 2]
    assert not runs.of_kind("clean", "health")
    # The poison is among what the spikes had, and in no step any more.
    folder = runs.folder / "runs" / "back"
    for number, spike in enumerate(SPIKES):
        had = explain_step(folder, spike, rollbacks=number)["documents"]
        assert any(map(is_poisoned, had))
    for step in range(1, STEPS + 1):
        assert not any(map(is_poisoned, explain_step(folder, step)["documents"]))
    dropped = [json.loads(line) for line in (folder / "rolled-back.jsonl").read_text().splitlines()]
    assert [line["step"] for line in dropped if line["kind"] == "train"] == [13, 14, 77, 78, 79]


def test_a_spike_is_rolled_back_and_leaves_no_trace(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    corpora = {"clean": runs.clean, "back": runs.poisoned, "skipped": runs.nonfinite}
    longer = [runs.recipe(name, "zero2-cpu", STEPS, corpus) for name, corpus in corpora.items()]
    check_going_on(runs, list(SAMPLE), [*longer, best_recipe(runs)], again=[best_recipe(runs)])
    check_end(runs)
    check_best(runs)  # which was started a second time, and had ended


@pytest.mark.exhaustive
def test_every_layout_goes_on_after_a_roll_back(tmp_path: Path) -> None:
    check_going_on(Runs(tmp_path), list(LAYOUTS))
