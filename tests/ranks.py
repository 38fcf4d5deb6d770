"""Starts ranks for tests: a free port, one thread each, a time-out, the failing rank's words, nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


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
) -> list[subprocess.Popen[bytes]]:
    """Start `python COMMAND` as `ranks` ranks with the launcher's variables; output goes to files in `logs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
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
        output = (logs / f"rank{rank}.log").open("wb") if logs else subprocess.DEVNULL
        processes.append(
            subprocess.Popen(
                [sys.executable, *command], env=rank_env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        )
    return processes


def run_ranks(
    ranks: int, command: Sequence[str], timeout_s: float = 300, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `python COMMAND` as `ranks` ranks to their end. When one fails, the others are ended soon."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(ranks, command, env, Path(folder))
        try:
            deadline = time.monotonic() + timeout_s
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    deadline = min(deadline, time.monotonic() + 30)
                time.sleep(0.05)
        finally:
            stop(processes)
        outputs = [(Path(folder) / f"rank{rank}.log").read_text(errors="replace") for rank in range(ranks)]
        return Ended([process.returncode for process in processes], outputs)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes that are still alive, and their children."""
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
    for process in processes:
        process.wait(timeout=30)
