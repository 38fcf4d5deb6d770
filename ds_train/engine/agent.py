"""`python -m ds_train.engine.agent`: starts a host's ranks, and ends them whatever becomes of the launch.

The launch writes one JSON line to the standard input (what to run, with which environment: secrets are neither on a
command line nor on a disk), keeps it open and sends a line now and then. `stop SECONDS` ends the ranks in that time; so
does the end of the input, when the launch was killed, or silence, when the network is gone. DeepSpeed's own front end
leaves remote ranks running then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

GRACE_S = 30.0
"""How long ranks have to end after SIGTERM where the launch doesn't say it."""

SILENCE_S = 30.0
"""How long the launch may say nothing, where it is on another machine."""

_LEFTOVER_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> int:
    """Run what the first line asks for; returns its exit code, 128 + n where signal n ended a rank."""
    with open(0, "rb", buffering=0, closefd=False) as unread:  # what follows the line stays for `select`
        order = unread.readline()
    if not order:
        return 1
    spec = json.loads(order)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    asked = _asked_to_end()
    child = subprocess.Popen(
        spec["command"],
        env=rank_environment(os.environ, spec),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_begin_launcher,
    )
    _watch(child, asked, SILENCE_S if spec["remote"] else float("inf"))
    _clear()
    return exit_code(child.wait())


def rank_environment(environ: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, str]:
    """The environment of this host's ranks: what the launch sends, and defaults that each host knows best."""
    env = {**environ, **spec["environment"]}
    # What is compiled at first use looks for ninja there.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, psutil.cpu_count(logical=False) or cores) // spec["ranks"]
    env.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return env


def exit_code(code: int) -> int:
    """128 + n where signal n ended DeepSpeed's launcher (-n) or one of its ranks (256 - n): the shell's convention."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code


def _watch(child: subprocess.Popen[bytes], asked: list[float], silence_s: float) -> None:
    """Until `child` has ended, by itself or because it was asked to."""
    kill_at: float | None = None
    heard, unended = time.monotonic(), b""
    listening = True
    while child.poll() is None:
        if not listening:
            time.sleep(0.2)
        elif select.select([0], [], [], 0.2)[0]:
            words = os.read(0, 4096)
            heard = time.monotonic()
            listening = bool(words)
            orders, unended = _whole_orders(unended + words)
            asked += orders if words else [GRACE_S]
        elif time.monotonic() - heard > silence_s:
            listening = False
            asked.append(0.0)
        if asked:
            if kill_at is None:
                _tell(child)
            kill_at = min(kill_at or float("inf"), time.monotonic() + min(asked))
            asked.clear()
        if kill_at is not None and time.monotonic() >= kill_at:
            _kill_all()


def _whole_orders(words: bytes) -> tuple[list[float], bytes]:
    """(seconds of each `stop SECONDS` that has come whole, the line that hasn't): a network may cut lines in two."""
    *lines, unended = words.split(b"\n")
    return [float(line.split()[1]) for line in lines if line], unended


def _tell(launcher: subprocess.Popen[bytes]) -> None:
    """Ask the ranks themselves to end: DeepSpeed's launcher would kill each of them 30 seconds after it has told it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(launcher.pid)
        for process in own.children() or [own]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _begin_launcher() -> None:
    """In DeepSpeed's launcher before it begins: should this process be killed, it is told and ends its ranks.

    SIGUSR1, which Slurm sends to every process of a job step, would end it, and then its ranks. They listen for it.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _asked_to_end() -> list[float]:
    """Seconds to end in, appended when a signal comes."""
    asked: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.append(GRACE_S))
    return asked


def _clear() -> None:
    """End what the ranks left behind, such as ranks whose launcher was killed."""
    left = psutil.Process().children(recursive=True)
    if psutil.wait_procs(left, timeout=_LEFTOVER_S)[1]:
        _kill_all()


def _kill_all() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
