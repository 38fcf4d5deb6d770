"""A source that stops giving ends the process; one that is slow, or a consumer that is, doesn't."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ds_train.config import RunConfig
from ds_train.data import in_time, prepare
from ds_train.errors import HUNG_CODE


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(in_time.os, "_exit", found.append)
    monkeypatch.setattr(in_time.faulthandler, "dump_traceback", lambda file: None)
    return found


def watchers() -> int:
    return sum(thread.name == "in-time" for thread in threading.enumerate())


def test_a_read_that_hangs_ends_the_process_and_names_the_file(
    codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def read(opened: Callable[[str], None]) -> Iterator[int]:
        opened("/data/a.jsonl")
        yield 1
        opened("/data/b.jsonl")
        deadline = time.monotonic() + 10
        while not codes and time.monotonic() < deadline:  # a read that doesn't come back
            time.sleep(0.01)
        yield 2

    assert list(in_time.in_time(read, limit_s=0.2)) == [1, 2]
    assert codes[0] == HUNG_CODE
    assert "nothing has come from /data/b.jsonl for 0.2 s" in capsys.readouterr().err


def test_a_slow_source_and_a_slow_reader_have_their_time(codes: list[int]) -> None:
    def read(opened: Callable[[str], None]) -> Iterator[int]:
        for number in range(5):
            time.sleep(0.05)
            yield number

    seen = []
    for number in in_time.in_time(read, limit_s=0.5):
        time.sleep(0.7 if number == 2 else 0.0)
        seen.append(number)
    assert seen == list(range(5))
    assert codes == []


def test_the_watch_ends_with_what_it_watches() -> None:
    def failing(opened: Callable[[str], None]) -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(in_time.in_time(failing, limit_s=0.04))
    left_early = in_time.in_time(lambda opened: iter(range(5)), limit_s=0.04)
    assert next(left_early) == 0
    left_early.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while watchers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watchers() == 0


def test_the_files_of_a_source_are_told(recipe: Callable[..., RunConfig], tmp_path: object) -> None:
    run = recipe()
    for name in ("b.txt", "a.txt"):
        path = prepare.Path(str(run.data.path)) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    told: list[str] = []
    assert len(list(prepare.documents(run.data, run.task, opened=told.append))) == 2
    assert [prepare.Path(place).name for place in told] == ["a.txt", "b.txt"]
