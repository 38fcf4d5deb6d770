"""A run's folder is one run's at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_train.engine import alone
from ds_train.engine.ranks import RankInfo
from ds_train.errors import UserError

INFO = RankInfo(rank=0, ranks=1, local_rank=0, ranks_per_host=1, device="cpu")


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "on_main_first", lambda info, work: work())


def test_a_second_run_of_the_name_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with alone.alone_in(tmp_path, INFO):
        words = rf"name={tmp_path.name}: another run .* \(process {os.getpid()} on .*\)\. Fix: give this one another"
        for _ in range(2):
            with pytest.raises(UserError, match=words), alone.alone_in(tmp_path, INFO):
                pass
    with pytest.raises(ValueError, match="broken"), alone.alone_in(tmp_path, INFO):
        raise ValueError("broken")
    with alone.alone_in(tmp_path, INFO):
        pass


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with alone.alone_in(tmp_path, INFO):
            os._exit(0)
    os.waitpid(child, 0)
    with alone.alone_in(tmp_path, INFO):
        assert (tmp_path / alone.LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_where_there_are_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(alone.fcntl, "flock", no_locks)
    with alone.alone_in(tmp_path, INFO), alone.alone_in(tmp_path, INFO):
        pass
