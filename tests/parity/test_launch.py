"""Launches on this machine end with the code of what ended them, and leave no rank behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from ranks import ROOT, clean_environment

pytestmark = pytest.mark.parity

# A launch of the standard library's `timeit`, as a program that runs on until it is ended.
LAUNCH = """
import sys
from ds_train.engine.launch import World, run
from ds_train.plan.hostfile import Host
world = World((Host("localhost", (0, 1)),), "127.0.0.1", 29500, "cpu")
ended = run(world, ["timeit", "-n1", "-r1", "import time; time.sleep(600)"])
print(ended)
sys.exit(ended.code)
"""


def started() -> tuple[subprocess.Popen[str], dict[str, list[psutil.Process]]]:
    """A launch, and its processes by kind once both ranks run."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH], cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, list[psutil.Process]] = {"agent": [], "deepspeed": [], "rank": []}
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                kind = "agent" if "ds_train.engine.agent" in words else "deepspeed" if "--module" in words else "rank"
                found[kind].append(child)
        if len(found["rank"]) == 2 and all("timeit" in rank.cmdline() for rank in found["rank"]):
            return process, found
        time.sleep(0.2)
    process.kill()
    pytest.fail("two ranks don't run after 120 s")


@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [
        ("rank", signal.SIGKILL, 128 + 9),
        pytest.param("deepspeed", signal.SIGKILL, 128 + 9, marks=pytest.mark.exhaustive),
        ("launch", signal.SIGTERM, 128 + 15),
        ("launch", signal.SIGKILL, -9),
        pytest.param("agent", signal.SIGKILL, 128 + 9, marks=pytest.mark.exhaustive),
    ],
)
def test_whatever_is_killed_nothing_is_left(victim: str, number: signal.Signals, code: int) -> None:
    launch, processes = started()
    everyone = [process for kind in processes.values() for process in kind]
    try:
        target: Callable[[int], None] = launch.send_signal if victim == "launch" else processes[victim][0].send_signal
        target(number)
        words = launch.communicate(timeout=60)[0]
        assert launch.returncode == code, words
        assert not psutil.wait_procs(everyone, timeout=30)[1]
    finally:
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if code == 128 + 9:
        assert words == "localhost: a rank or its launcher was ended by signal SIGKILL\n"
