"""A signal is a wish that the step loop sees; the launcher's end is one too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from ds_train.engine import stop
from ds_train.engine.stop import SIGNALS, StopRequest


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    return what()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_and_the_process_goes_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(grace_s=60) as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        assert eventually(lambda: request.requested)
        assert request.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # what DeepSpeed's launcher sends after a Ctrl-C
    assert signal.getsignal(number) == before


def test_the_first_signal_is_the_reason() -> None:
    with StopRequest(grace_s=60) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert eventually(lambda: request.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert request.reason == "SIGUSR1"


@pytest.mark.parametrize("agreed", [True, False])
def test_after_an_agreed_stop_the_launchers_word_changes_no_exit_code(agreed: bool) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopRequest(grace_s=60) as request:
            request.agreed = agreed
        after = {number: signal.getsignal(number) for number in SIGNALS}
        ignored = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN) if agreed else {}
        assert after == before | ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_child_that_is_ended_stops_no_run() -> None:
    with StopRequest(grace_s=60) as request:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM, "a fork has the ordinary handlers"
        time.sleep(0.05)
        assert not request.requested


def test_a_child_that_goes_on_holds_up_no_end() -> None:
    request = StopRequest(grace_s=60)
    with request:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        started = time.monotonic()
    try:
        assert time.monotonic() - started < 5.0
        assert not request.requested
    finally:
        child.kill()
        child.join()


def test_the_end_of_the_launcher_is_a_wish_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(stop, "_launchers", lambda: [psutil.Process(launcher.pid)])
    monkeypatch.setattr(stop, "_LOOK_EVERY_S", 0.01)
    with StopRequest(grace_s=60) as request:
        time.sleep(0.05)
        assert not request.requested
        launcher.kill()
        assert eventually(lambda: request.requested)
        assert request.reason == "the end of its launcher"
    launcher.wait()


def test_only_deepspeeds_launcher_counts() -> None:
    assert stop._launchers() == []
    script = "import sys; sys.argv; from ds_train.engine import stop; print(len(stop._launchers()))"
    # `-c` leaves what follows to the program: a parent that looks like DeepSpeed's launcher.
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {script!r}]).returncode)"
    done = subprocess.run(
        [sys.executable, "-c", parent, "deepspeed.launcher.launch"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_a_step_that_does_not_end_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(stop, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    monkeypatch.setattr(stop.faulthandler, "dump_traceback", lambda file: None)
    with StopRequest(grace_s=0.1):
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: bool(codes))
    assert codes[0] == 75
