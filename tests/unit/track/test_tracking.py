"""Metrics, wandb and the display: nothing is lost, and nothing of it can stop a run."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from wandb.proto import wandb_internal_pb2

from ds_train.config import RunConfig
from ds_train.models.load import matrix_parameters
from ds_train.track.flops import flops_per_token, mfu
from ds_train.track.memory import memory
from ds_train.track.metrics import MetricsFile, read_metrics
from ds_train.track.progress import StepDisplay
from ds_train.track.tracker import Tracker

TRAIN = {
    "kind": "train", "step": 1, "tokens": 64, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 1000.0,
    "mfu": 0.31, "memory_mb": 512.0,
}  # fmt: skip


def test_records_are_strict_json_and_non_finite_numbers_survive(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", pytest.fail)
    file.write({"kind": "train", "step": 1, "loss": float("nan"), "norms": [float("inf"), 1.0]})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "train",
        "step": 1,
        "loss": "nan",
        "norms": ["inf", 1.0],
    }


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)) + '{"step": 9, "lo')
    MetricsFile(path, pytest.fail).truncate_after(5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_disk_that_refuses_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "no folder" / "metrics.jsonl", said.append)
    file.write(TRAIN)
    file.write(TRAIN)
    assert len(said) == 1
    (tmp_path / "no folder").mkdir()
    file.write(TRAIN)
    assert len(read_metrics(tmp_path / "no folder" / "metrics.jsonl")) == 1


def test_flops_equal_a_count_over_the_models_matrix_products() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, length = LlamaForCausalLM(config), 16
    counted = 0

    def count(module: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * inputs[0].shape[1] * module.in_features * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)  # type: ignore[arg-type]
    model(input_ids=torch.zeros(1, length, dtype=torch.long))
    attention = 3 * 2 * (2 * length * length * 24)  # layers x (scores and values) x products
    assert flops_per_token(config, matrix_parameters(model), length) * length == 3 * (counted + attention)
    assert mfu(100.0, 2e9, 1e12) == pytest.approx(0.2)


def test_memory_is_that_of_the_process() -> None:
    before = memory("cpu")
    block = torch.ones(64 * 2**20 // 4)
    after = memory("cpu")
    assert 50 < after["memory_mb"] - before["memory_mb"] < 90
    assert after["memory_peak_mb"] >= after["memory_mb"] - 1
    del block


def test_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    display = StepDisplay(3, 0, "auto", Console(file=out, soft_wrap=True))
    for step in (1, 2, 3):
        display.show({**TRAIN, "step": step}, step)
    display.show({"kind": "eval", "loss": 1.5, "perplexity": 4.48, "accuracy": 0.5}, 3)
    display.close()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step      1/3  loss 2.5000  lr 1.00e-03  norm 0.70  1,000 tokens/s  MFU 31%")
    assert len(lines) == 3, "a line at the start, none right after it, one at the end, one for the evaluation"
    assert "held out: loss 1.5000" in lines[2]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of an offline run's file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB, records cut
    into chunks of checksum, length, type 1 whole / 2 first / 3 middle / 4 last)."""
    content, place, pieces = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def history(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(run id, config, history rows) of the newest offline wandb run, read back from its file."""
    newest = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    run_id, config, rows = "", {}, []
    for data in wandb_records(newest):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run_id = record.run.run_id
            config.update(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.run.config.update}
            )
        if record.HasField("history"):
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return run_id, config, rows


def test_an_offline_wandb_run_reads_back_and_continues_under_its_id(
    tmp_path: Path, recipe: Callable[..., RunConfig]
) -> None:
    run = recipe(track={"wandb": "offline", "progress": False})
    tracker = Tracker(run, {"zero_stage": 2}, tmp_path, True, 2, 0, None)
    first = tracker.wandb_id
    tracker.log(TRAIN, 1)
    tracker.log({"kind": "eval", "step": 1, "loss": 1.5, "perplexity": 4.48, "accuracy": 0.5, "tokens": 64}, 1)
    tracker.close(0)
    run_id, config, rows = history(tmp_path)
    assert run_id == first
    assert config["plan"] == {"zero_stage": 2}
    assert config["recipe"]["schedule"]["steps"] == 4
    merged = {key: value for row in rows for key, value in row.items()}
    assert (merged["train/loss"], merged["eval/loss"], merged["tokens"]) == (2.5, 1.5, 64)
    again = Tracker(run, {}, tmp_path, True, 2, 1, first)
    assert again.wandb_id == first
    again.close(0)


def test_wandb_that_fails_never_stops_a_run(
    tmp_path: Path,
    recipe: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no login\nlong trace")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = Tracker(recipe(track={"wandb": "online", "progress": False}), {}, tmp_path, True, 2, 0, None)
    tracker.log(TRAIN, 1)
    tracker.close(0)
    assert "wandb is off: no login; training goes on" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5


def test_other_ranks_report_nothing(tmp_path: Path, recipe: Callable[..., RunConfig]) -> None:
    tracker = Tracker(recipe(track={"wandb": "offline"}), {}, tmp_path, False, 2, 0, None)
    tracker.log(TRAIN, 1)
    tracker.note("hello")
    tracker.close(0)
    assert list(tmp_path.glob("*")) == []
