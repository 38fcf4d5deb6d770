"""Starts ranks for tests: a free port, one thread each, a time-out, the failing rank's words, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Protocol

import psutil

from ds_train.engine.port import free_port

ROOT = Path(__file__).resolve().parent.parent

PRELOADED: list[str] = []
"""Modules that a fork server imports once, from which ranks are then forked (conftest.py fills it); without any, each
rank is an interpreter of its own."""


class Rank(Protocol):
    """What the tests ask of a started rank, as `subprocess.Popen` has it."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """As `poll`, after it."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """`poll` after its end."""

    def kill(self) -> None:
        """Send it SIGKILL."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


@dataclass(frozen=True)
class Ended:
    """How a set of ranks ended: exit code and output of each."""

    codes: list[int]
    outputs: list[str]

    def check(self) -> Ended:
        """Fail with the output of the ranks that ended badly."""
        bad = [
            f"--- rank {rank}, exit code {code}\n{text[-6000:]}"
            for rank, (code, text) in enumerate(zip(self.codes, self.outputs, strict=True))
            if code
        ]
        assert not bad, "\n".join(bad)
        return self


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child that trains on the CPU and reaches no hub."""
    env = {
        key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"}
    }
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"}
    return env | fixed | path | dict(extra or {})


def start_ranks(
    ranks: int, command: Sequence[str], env: Mapping[str, str] | None = None, logs: Path | None = None
) -> list[Rank]:
    """Start `python COMMAND` as `ranks` ranks with the launcher's variables; output goes to files in `logs`."""
    port = free_port()
    processes: list[Rank] = []
    for rank in range(ranks):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        rank_env = clean_environment({key: str(value) for key, value in place.items()} | dict(env or {}))
        output = logs / f"rank{rank}.log" if logs else Path(os.devnull)
        if PRELOADED:
            processes.append(_Forked(command, rank_env, output))
            continue
        with output.open("wb") as file:
            started = subprocess.Popen(
                [sys.executable, *command], env=rank_env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )
        processes.append(started)
    return processes


class _Forked:
    """A rank that the fork server starts: the libraries, seconds of every rank's start, are there already."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        _start_server()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_become, args=(list(command), dict(env), str(output)), daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


def _start_server() -> None:
    """Start the fork server in the ranks' environment: libraries read some of it when they are imported."""
    own = dict(os.environ)
    os.environ.update(clean_environment())
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(own)


def _become(command: list[str], env: dict[str, str], output: str) -> None:
    """Be `python COMMAND` with its environment and output, in a process of the fork server."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")


def run_ranks(
    ranks: int, command: Sequence[str], timeout_s: float = 300, env: Mapping[str, str] | None = None,
    settle_s: float = 30,
) -> Ended:  # fmt: skip
    """Run `python COMMAND` as `ranks` ranks to their end. When one fails, the others are ended `settle_s` later."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(ranks, command, env, Path(folder))
        try:
            deadline = time.monotonic() + timeout_s
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    deadline = min(deadline, time.monotonic() + settle_s)
                time.sleep(0.05)
        finally:
            stop(processes)
        outputs = [(Path(folder) / f"rank{rank}.log").read_text(errors="replace") for rank in range(ranks)]
        return Ended([process.returncode for process in processes], outputs)


def stop(processes: Sequence[Rank]) -> None:
    """End the processes that are still alive, and their children."""
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
    for process in processes:
        process.wait(timeout=30)
