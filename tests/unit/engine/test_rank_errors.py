"""Who tells a user's error: rank 0, or a rank that alone has met it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from ds_train.engine import ranks
from ds_train.engine.port import free_port
from ds_train.errors import EXIT_CODE, user_error


def failing(_: ranks.RankInfo) -> None:
    raise user_error("model.path", "there is no such folder here", "copy it to this host", "/weights")


@pytest.mark.parametrize("main_waits", [True, False])
def test_a_rank_tells_what_rank_0_has_not_met(
    main_waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_FAREWELL_S", 0.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1] if main_waits else free_port()
        for name, value in {"RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        assert ranks.run_to_exit_code(failing) == EXIT_CODE
    told = capsys.readouterr().err
    assert ("error (rank 3 on " in told) == main_waits
    assert ("model.path=/weights" in told) == main_waits


def test_rank_0_tells_a_line_per_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert ranks.run_to_exit_code(failing) == EXIT_CODE
    assert capsys.readouterr().err.startswith("error: model.path=/weights: there is no such folder here.")


ENDING = """
import atexit, threading, time
from ds_train.engine.ranks import end
atexit.register(lambda: print("exit function"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
end(75)
"""


def test_a_rank_ends_after_its_threads_and_exit_functions() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split("\n")) == (75, ["thread", "exit function", ""])
