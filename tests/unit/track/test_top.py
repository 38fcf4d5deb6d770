"""The live view: what a terminal shows of a run, and that it ends when it is told to."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ds_train.track.runs import Run, read_run
from ds_train.track.top import sparkline, state, view, watch


def record(step: int, **changes: Any) -> dict[str, Any]:
    base = {
        "kind": "train", "step": step, "tokens": 64 * step, "loss": 3.0 - step / 100, "lr": 1e-3, "grad_norm": 0.7,
        "tokens_per_second": 12345.0, "mfu": 0.314, "step_ms": 500.0, "save_ms": 0.0, "forward_ms": 300.0,
        "collectives_ms": 200.0, "memory_peak_mb": 2048.0, "time": 1000.0 + step / 2,
    }  # fmt: skip
    return base | changes


def write(folder: Path, records: list[dict[str, Any]], total: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.yaml").write_text(f"name: mine\nschedule: {{steps: {total}}}\n")
    return folder


def shown(run: Run, now: float, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view(run, now, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_shown(tmp_path: Path) -> None:
    events = [{"kind": "rollback", "step": 30, "to_step": 20}]
    text = shown(read_run(write(tmp_path / "run", [*(record(step) for step in range(1, 41)), *events])), 1021.0)
    for words in ("mine  running", "step 40 of 100   0:00:30 left", "2.6000", "12.3k", "31.4 %", "2 GB", "500 ms"):
        assert words in text
    assert "█ forward 60 %   ▒ collectives 40 %" in text
    assert "rollback  to step 20" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_longer_than_the_terminal(tmp_path: Path, width: int) -> None:
    events = [{"kind": "save", "step": 3, "path": "/a/long/path" * 20}]
    run = read_run(write(tmp_path / "run", [*(record(step) for step in range(1, 41)), *events]))
    assert max(map(len, shown(run, 1020.0, width).splitlines())) <= width


def test_how_a_run_stands(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", [record(step) for step in range(1, 41)]))
    assert state(run, 1021.0) == ("running", 30.0)
    assert state(run, 1020.0 + 200)[0] == "silent for 0:03:20"
    assert state(read_run(write(tmp_path / "run", [record(100)])), 9999.0) == ("finished", None)
    slow = [record(step, step_ms=60_000.0) for step in range(1, 5)]
    assert state(read_run(write(tmp_path / "run", slow)), 1002.0 + 300)[0] == "running"


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([{"kind": "stop", "step": 40, "reason": "SIGTERM"}], "stopped"),
        ([{"kind": "fault", "step": 40, "reason": "rank 1 hangs"}], "failed"),
        ([{"kind": "health", "event": "stopped", "step": 40, "verdict": "divergence"}], "failed"),
        ([{"kind": "health", "event": "stopped-early", "step": 40}, {"kind": "save", "step": 40}], "finished early"),
        ([{"kind": "stop", "step": 40}, {"kind": "resume", "step": 40}], "running"),
        ([{"kind": "fault", "step": 40}, {"kind": "restart", "step": 30}], "running"),
        ([{"kind": "health", "event": "skipped", "step": 40}], "running"),
        ([{"kind": "stop", "step": 30, "time": 1015.0}], "running"),
    ],
)
def test_a_run_that_ends_before_its_last_step_says_so(tmp_path: Path, events: list[dict[str, Any]], word: str) -> None:
    records = [*(record(step) for step in range(1, 41)), *({"time": 1020.5} | event for event in events)]
    found = state(read_run(write(tmp_path / "run", records)), 1021.0)
    assert found == (word, 30.0 if word == "running" else None)


def test_a_run_by_epochs_says_itself_how_long_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(step) for step in range(1, 41)])
    (folder / "recipe.yaml").write_text("name: mine\nschedule: {epochs: 2}\n")
    assert state(read_run(folder), 1021.0) == ("running", None)
    (folder / "data.json").write_text('{"skips": [], "steps": 40}')
    assert state(read_run(folder), 9999.0) == ("finished", None)


def test_a_long_name_leaves_room_for_how_the_run_stands(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(step) for step in range(1, 41)])
    (folder / "recipe.yaml").write_text(f"name: {'名' * 60}\nschedule: {{steps: 100}}\n")
    first, second, *_ = shown(read_run(folder), 1021.0, 40).splitlines()
    assert first.endswith("…  running")
    assert second == "step 40 of 100   0:00:30 left"


def test_a_sparkline_keeps_spikes() -> None:
    values = np.ones(1000)
    values[503] = 9.0
    assert sparkline(values, 10) == "▁▁▁▁▁█▁▁▁▁"
    assert sparkline(np.array([np.nan, 1.0, 2.0]), 10) == "▁█"
    assert sparkline(np.zeros(0), 10) == ""


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(step) for step in range(1, 1001)])
    run = read_run(folder, last_bytes=5000)
    assert 5 < len(run.train) < 40
    assert run.last["step"] == 1000


def test_without_a_terminal_it_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(write(tmp_path / "run", [record(1)]), every_s=3600.0)
    assert "step 1 of 100" in capsys.readouterr().out


def test_in_a_terminal_it_follows_the_file_until_it_is_ended(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(step) for step in range(1, 11)])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ds_train.cli", "top", str(folder), "--every", "0.1"]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=Path(__file__).parents[3],
        # A shell starts what runs in the background deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        seen = read_until(ours, b"step 10 of 100")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record(11)) + "\n")
        seen += read_until(ours, b"step 11 of 100")
        process.send_signal(signal.SIGINT)
        seen += read_to_end(ours)
        assert process.wait(timeout=20) == 0
        assert b"\x1b[?1049h" in seen, "the terminal's other screen: what was on it comes back"
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_to_end(descriptor: int) -> bytes:
    """What is written until nobody has the other end any more; unread, it would hold up whoever writes it."""
    seen, deadline = b"", time.monotonic() + 30
    with suppress(OSError):
        while piece := os.read(descriptor, 65536):
            assert time.monotonic() < deadline, seen[-2000:]
            seen += piece
    return seen


def read_until(descriptor: int, words: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 30
    while words not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(descriptor, 65536)
    return seen
