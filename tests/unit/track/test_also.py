"""CSV and TensorBoard hold the records that metrics.jsonl does, also of a run that was continued."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_train.config import RunConfig
from ds_train.track.named import named
from ds_train.track.tables import Tables
from ds_train.track.tracker import Tracker


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_grouped_by_what_is_measured() -> None:
    record = {
        "kind": "train", "step": 1, "tokens": 64, "time": 5.0, "loss": 2.5, "applied": True, "mfu": 0.3, "data_ms": 1.0,
        "memory_mb": 5, "host_cpu_percent": [10.0, 20.0], "text": "words", "grad_norm": "nan", "none": None,
    }  # fmt: skip
    found = named(record)
    assert str(found.pop("train/grad_norm")) == "nan"
    assert found == {
        "train/loss": 2.5, "train/applied": 1.0, "speed/mfu": 0.3, "speed/data_ms": 1.0, "memory/memory_mb": 5.0,
        "host/0/cpu_percent": 10.0, "host/1/cpu_percent": 20.0,
    }  # fmt: skip
    assert named({"kind": "save", "step": 1, "bytes": 7, "path": "c"}) == {"save/bytes": 7.0}


def test_a_table_for_each_kind_that_grows_new_columns(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "csv", 0)
    tables.log({"kind": "train", "step": 1, "loss": 2.5}, 1)
    tables.log({"kind": "save", "step": 1, "path": "a, b"}, 1)
    tables.log({"kind": "train", "step": 2, "loss": 2.25, "noise": 3}, 2)
    tables.log({"kind": "train", "step": 3, "loss": 2.0}, 3)
    assert rows(tmp_path / "csv" / "train.csv") == [
        {"step": "1", "loss": "2.5", "noise": ""},
        {"step": "2", "loss": "2.25", "noise": "3"},
        {"step": "3", "loss": "2.0", "noise": ""},
    ]
    assert rows(tmp_path / "csv" / "save.csv") == [{"step": "1", "path": "a, b"}]
    assert not list((tmp_path / "csv").glob("*.partial"))


def test_a_continued_run_writes_later_rows_again(tmp_path: Path) -> None:
    first = Tables(tmp_path, 0)
    for step in range(1, 5):
        first.log({"kind": "train", "step": step, "loss": 1.0}, step)
    with (tmp_path / "train.csv").open("a") as file:
        file.write("5")  # a crash in the middle of a row
    again = Tables(tmp_path, 2)
    again.log({"kind": "train", "step": 3, "loss": 9.0}, 3)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "train.csv")] == [
        ("1", "1.0"),
        ("2", "1.0"),
        ("3", "9.0"),
    ]


def test_a_table_that_cannot_be_written_stops_nothing(
    tmp_path: Path, recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csv").write_text("a file where the folder should be")
    tracker = Tracker(recipe(track={"also": ["csv"], "progress": False}), {}, tmp_path, True, 2, 0, None)
    tracker.log({"kind": "save", "step": 1}, 1)
    tracker.close(0)
    assert "csv is off: " in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").exists()


def twice_from_the_third() -> list[dict[str, Any]]:
    """Records of steps 1 to 4, of the roll-back to step 2, and of steps 3 to 5."""
    base = {"kind": "train", "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "mfu": 0.5}
    base |= {"memory_mb": 1.0, "step_ms": 1.0}
    steps = [base | {"step": step, "tokens": 64 * step, "loss": float(step)} for step in range(1, 5)]
    back = {"kind": "health", "event": "roll-back", "step": 2, "spike_step": 4}
    again = [base | {"step": step, "tokens": 64 * step, "loss": 9.0} for step in range(3, 6)]
    return [*steps, back, *again]


def test_tensorboard_reads_back(tmp_path: Path, recipe: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = recipe(track={"also": ["tensorboard"], "progress": False})
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # stopped after step 3, continued after step 2
        tracker = Tracker(run, {}, tmp_path, True, 4, done, None)
        for step in steps:
            record: dict[str, Any] = {"kind": "train", "step": step, "loss": step + done / 10, "mfu": 0.5}
            record |= {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "memory_mb": 1.0, "step_ms": 1.0}
            tracker.log(record, step)
        tracker.close(0)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (step, pytest.approx(value)) for step, value in ((1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2))
    ]
    assert "speed/mfu" in read.Tags()["scalars"]


def test_a_roll_back_takes_back_what_it_gives_up(tmp_path: Path, recipe: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = recipe(track={"also": ["tensorboard", "csv"], "progress": False})
    tracker = Tracker(run, {}, tmp_path, True, 9, 0, None)
    for record in twice_from_the_third():
        if record["kind"] == "health":
            tracker.go_back(record["step"])
        tracker.log(record, record["step"])
    tracker.close(0)
    expected = [(1, 1.0), (2, 2.0), (3, 9.0), (4, 9.0), (5, 9.0)]
    found = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path / "csv" / "train.csv")]
    assert found == expected
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == expected
