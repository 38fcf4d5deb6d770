"""Metrics, wandb and the display: nothing is lost, and nothing of it can stop a run."""

from __future__ import annotations

import errno
import io
import json
import re
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from rich.console import Console
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
)
from wandb.proto import wandb_internal_pb2

from ds_train.config import RunConfig
from ds_train.errors import print_anything
from ds_train.models.load import matrix_parameters
from ds_train.track.flops import flops_per_token, mfu
from ds_train.track.memory import memory
from ds_train.track.metrics import MetricsFile, read_metrics
from ds_train.track.peak import measure_peak_flops
from ds_train.track.progress import StepDisplay, _Screen
from ds_train.track.tracker import Tracker

TRAIN = {
    "kind": "train", "step": 1, "tokens": 64, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 1000.0,
    "mfu": 0.31, "step_ms": 1000.0, "memory_mb": 512.0, "host_cpu_percent": [10.0, 20.0],
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


def test_a_run_that_goes_back_keeps_what_it_gives_up_in_another_file(tmp_path: Path) -> None:
    path, dropped = tmp_path / "metrics.jsonl", tmp_path / "rolled-back.jsonl"
    for last in (8, 6):
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, last)))
        MetricsFile(path, pytest.fail).truncate_after(4, dropped.name)
        assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert [record["step"] for record in read_metrics(dropped)] == [5, 6, 7, 5]


def test_a_disk_that_refuses_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "no folder" / "metrics.jsonl", said.append)
    file.write(TRAIN)
    file.write(TRAIN)
    assert len(said) == 1
    (tmp_path / "no folder").mkdir()
    file.write(TRAIN)
    assert len(read_metrics(tmp_path / "no folder" / "metrics.jsonl")) == 1


def test_a_line_that_fits_in_part_leaves_no_half_line(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, said.append)
    file.write({"step": 1})
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, limits[1]))  # the kernel takes 5 bytes, then none
        file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    assert len(said) == 1
    file.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_metrics_that_cannot_be_cut_back_stop_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    MetricsFile(tmp_path / "no folder" / "metrics.jsonl", said.append).truncate_after(3)
    assert len(said) == 1


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
    assert mfu(2e11, 1e12) == pytest.approx(0.2)


def test_attention_is_counted_layer_by_layer() -> None:
    def attention(config: PreTrainedConfig, length: int) -> float:
        return flops_per_token(config, 0, length)

    assert attention(MambaConfig(), 64) == 0
    gemma = Gemma3TextConfig(
        num_hidden_layers=3, num_attention_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    assert attention(gemma, 64) == 12 * 16 * (16 + 16 + 64)
    assert attention(gemma, 8) == 12 * 16 * 3 * 8
    latent = DeepseekV3Config(
        num_hidden_layers=2, num_attention_heads=4, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16
    )
    # Forward and backward are 3 times the forward pass: of 2 layers, each the products of scores and of values.
    assert attention(latent, 10) == 3 * 2 * (2 * 4 * 10 * 32 + 2 * 4 * 10 * 16)
    uneven = Gemma4TextConfig(
        num_hidden_layers=2, num_attention_heads=2, head_dim=8, global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert attention(uneven, 10) == 12 * 10 * (2 * 8 + 2 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_quickly_and_draws_no_random_number_of_the_run(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = measure_peak_flops(dtype, torch.device("cpu"))
    assert 1e8 < peak < 1e14
    assert time.perf_counter() - started < 2, "a third of a second, and room for a busy machine"
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_that_of_the_process() -> None:
    before = memory("cpu")
    block = torch.ones(64 * 2**20 // 4)
    after = memory("cpu")
    assert 50 < after["memory_mb"] - before["memory_mb"] < 90
    assert after["memory_peak_mb"] >= after["memory_mb"]
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
    assert lines[1].endswith("0:00:00 left")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_bar_of_any_width_has_the_step_and_the_time_left(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, soft_wrap=True, color_system=None)
    display = StepDisplay(100_000, 0, True, console)
    display.show({**TRAIN, "memory_mb": 61440.0, "tokens_per_second": 1.6e6}, 12345)
    display.close()
    line = re.split(r"[\r\n]", out.getvalue().rstrip("\x1b[?25h\n"))[-1].removeprefix("\x1b[2K")
    assert line.startswith("step  12345/100000 ")
    assert line.rstrip().endswith("-:--:--")
    assert "…" not in line
    assert len(line) <= width
    assert ("loss 2.5000" in line) == (width > 50)
    assert ("61,440 MB" in line) == (width > 100)


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "the terminal is closed")])
def test_a_run_outlives_whoever_reads_along(monkeypatch: pytest.MonkeyPatch, error: OSError, bar: bool) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise error

    monkeypatch.setattr("rich.console.os.dup2", lambda *_: None)  # what it would close is pytest's
    # A bar is drawn from its own thread, too, whose end is no matter.
    monkeypatch.setattr("rich.live._RefreshThread.run", lambda _: None)
    out = io.StringIO()
    console = _Screen(file=out, soft_wrap=True, force_terminal=bar)
    display = StepDisplay(3, 0, bar, console)
    console.file = Gone()
    display.show(TRAIN, 1)
    display.note("saved")
    display.note("saved again")
    display.close()


def test_what_an_encoding_lacks_is_printed_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", b"gr\\xf6\\xdfe \\u2581\n"), ("utf-8", "größe ▁\n".encode())):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        print_anything()
        StepDisplay(3, 0, False).note("größe ▁")
        sys.stdout.flush()
        assert out.getvalue() == expected


def test_lines_become_rarer_as_a_run_grows_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ds_train.track.progress.time.monotonic", lambda: now)
    out = io.StringIO()
    display = StepDisplay(100_000, 0, False, Console(file=out, soft_wrap=True))
    shown = []
    for step in range(1, 36_001):  # ten hours, a step a second
        now = float(step)
        before = out.tell()
        display.show(TRAIN, step)
        if out.tell() > before:
            shown.append(step)
    assert shown[:4] == [1, 6, 11, 16]
    assert shown[-1] - shown[-2] == 60
    assert len(shown) < 1000
    left = out.getvalue().splitlines()[0].rpartition("  ")[2]
    assert left == "1 day, 3:46:39 left"


def test_the_time_left_leaves_out_what_came_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ds_train.track.progress.time.monotonic", lambda: now)
    out = io.StringIO()
    display = StepDisplay(120, 10, False, Console(file=out, soft_wrap=True))
    for step in (20, 40):
        now = 580.0 + step  # data and weights, then steps of a second
        display.show(TRAIN, step)
    assert [line.rpartition("  ")[2] for line in out.getvalue().splitlines()] == ["0:01:40 left", "0:01:20 left"]


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


def records_of(folder: Path) -> Iterator[Any]:
    """Records of the newest offline wandb run."""
    wandb.teardown()  # wandb's own process writes the file, until this ends it
    newest = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for data in wandb_records(newest):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def history(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(run id, config, history rows) of the newest offline wandb run, read back from its file."""
    run_id, config, rows = "", {}, []
    for record in records_of(folder):
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
    tmp_path: Path, recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe(track={"wandb": "offline", "wandb_artifacts": "export", "progress": False})
    tracker = Tracker(run, {"zero_stage": 2}, tmp_path, True, 2, 0, None)
    first = tracker.wandb_id
    tracker.log(TRAIN, 1)
    tracker.log({"kind": "eval", "step": 1, "loss": 1.5, "perplexity": 4.48, "accuracy": 0.5, "tokens": 64}, 1)
    tracker.log({"kind": "sample", "step": 1, "prompt": "once", "text": " upon"}, 1)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    tracker.keep(tmp_path / "export", "checkpoint", 1)
    tracker.keep(tmp_path / "export", "export", 1)
    tracker.close(0)
    run_id, config, rows = history(tmp_path)
    assert run_id == first
    assert config["plan"] == {"zero_stage": 2}
    assert config["recipe"]["schedule"]["steps"] == 4
    merged = {key: value for row in rows for key, value in row.items()}
    assert (merged["train/loss"], merged["eval/loss"], merged["tokens"]) == (2.5, 1.5, 64)
    assert (merged["speed/mfu"], merged["memory/memory_mb"], merged["host/1/cpu_percent"]) == (0.31, 512.0, 20.0)
    assert merged["eval/samples._type"] == "table-file"
    assert merged["report/page._type"] == "html-file"
    assert merged["report/training-loss._type"] == "image-file"
    written = list(records_of(tmp_path))
    over = {r.metric.glob_name or r.metric.name: r.metric for r in written if r.HasField("metric")}
    axes = {name: metric.step_metric for name, metric in over.items()}
    assert {"train/*", "eval/*", "speed/*", "memory/*", "host/*", "save/*"} <= axes.keys()
    assert {axis for name, axis in axes.items() if name != "tokens"} == {"tokens"}
    assert over["eval/loss"].summary.min
    artifacts = [r.request.log_artifact.artifact for r in written if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in written if r.HasField("artifact")]
    assert {artifact.name for artifact in artifacts if artifact.type == "model"} == {"run-export"}
    assert f"wandb: wandb sync {tmp_path / 'wandb'}" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    again = Tracker(run, {"zero_stage": 3}, tmp_path / "again", True, 2, 1, first)
    assert again.wandb_id == first
    again.log({**TRAIN, "step": 2, "tokens": 128}, 2)
    again.close(0)
    run_id, config, rows = history(tmp_path / "again")
    assert (run_id, config["plan"]["zero_stage"]) == (first, 3)
    assert {key: value for row in rows for key, value in row.items()}["tokens"] == 128


def test_an_offline_wandb_run_loses_no_step_to_a_roll_back(
    tmp_path: Path, recipe: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    run = recipe(track={"wandb": "offline", "progress": False})
    tracker = Tracker(run, {}, tmp_path, True, 9, 0, None)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        tracker.log({**TRAIN, "step": step, "tokens": 64 * step, "loss": loss}, step)
    tracker.go_back(2)
    tracker.log({"kind": "health", "event": "roll-back", "step": 2, "spike_step": 4}, 2)
    for step in (3, 4):
        tracker.log({**TRAIN, "step": step, "tokens": 64 * step, "loss": 9.0}, step)
    run_id = tracker.wandb_id
    tracker.close(0)
    expected = [(64, 1), (128, 2), (192, 3), (256, 4), (192, 9), (256, 9)]
    assert [(row["tokens"], row["train/loss"]) for row in history(tmp_path)[2]] == expected
    again = Tracker(run, {}, tmp_path, True, 9, 4, run_id)
    again.log({**TRAIN, "step": 5, "tokens": 320}, 5)
    again.close(0)
    assert history(tmp_path)[2][0]["_step"] == 7, "four steps, two again, and the fifth"
    assert "WARNING" not in capfd.readouterr().err


def test_wandb_that_fails_never_stops_a_run(
    tmp_path: Path,
    recipe: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no login\nlong trace")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = Tracker(recipe(track={"wandb": "online", "progress": False}), {}, tmp_path, True, 2, 0, None)
    tracker.log(TRAIN, 1)
    tracker.close(0)
    assert "wandb is off: no login; training goes on" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5


class BrokenRun:
    """A wandb run whose every call fails but those that start it."""

    id = url = "abc"
    dir = "/nowhere/files"

    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise OSError("disk full")

    log_artifact = log

    def finish(self, **__: object) -> None:
        self.calls += 1
        raise RuntimeError("finish failed")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> BrokenRun:
    run = BrokenRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    return run


def test_wandb_is_off_after_its_first_failure(
    tmp_path: Path, recipe: Callable[..., RunConfig], broken: BrokenRun, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(recipe(track={"wandb": "offline", "progress": False}), {}, tmp_path, True, 2, 0, None)
    assert tracker.wandb_id == "abc"
    tracker.log(TRAIN, 1)
    tracker.log(TRAIN, 2)
    assert tracker.wandb_id is None
    tracker.keep(tmp_path, "export", 2)
    tracker.close(0)
    assert broken.calls == 1
    assert capsys.readouterr().out.count("wandb is off from here: disk full; training goes on") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_wandb_that_fails_to_finish_stops_nothing(
    tmp_path: Path, recipe: Callable[..., RunConfig], broken: BrokenRun, capsys: pytest.CaptureFixture[str]
) -> None:
    Tracker(recipe(track={"wandb": "offline", "progress": False}), {}, tmp_path, True, 2, 0, None).close(0)
    assert "wandb is off from here: finish failed" in capsys.readouterr().out


def test_wandb_is_only_imported_where_it_is_wanted(
    tmp_path: Path,
    recipe: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    Tracker(recipe(track={"progress": False}), {}, tmp_path, True, 2, 0, None).close(0)
    assert capsys.readouterr().out == ""
    Tracker(recipe(track={"wandb": "offline", "progress": False}), {}, tmp_path, True, 2, 0, None).close(0)
    assert "wandb is off" in capsys.readouterr().out


def test_other_ranks_report_nothing(tmp_path: Path, recipe: Callable[..., RunConfig]) -> None:
    tracker = Tracker(recipe(track={"wandb": "offline"}), {}, tmp_path, False, 2, 0, None)
    tracker.log(TRAIN, 1)
    tracker.note("hello")
    tracker.close(0)
    assert list(tmp_path.glob("*")) == []
