"""Starts the deepspeed launcher for benchmarks, and cleans up behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ds_train.engine.port import free_port

ROOT = Path(__file__).resolve().parent.parent


def folder_of(root: Path, row: str, seed: int) -> Path:
    """The folder of the run of a table's row."""
    return root / f"{''.join(letter if letter.isalnum() else '-' for letter in row)}-seed{seed}"


def launch(command: Sequence[str], ranks: int, threads: int = 1) -> str:
    """Run a script under the deepspeed launcher on CPU ranks; its output. Ends this process with it on failure."""
    with started(command, ranks, threads) as process:
        assert process.stdout is not None
        return process.stdout.read()


@contextmanager
def started(command: Sequence[str], ranks: int, threads: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A script under the deepspeed launcher on CPU ranks, waited for. Ends this process with its words on failure."""
    binaries = Path(sys.executable).parent
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{binaries}{os.pathsep}{env['PATH']}"
    arguments = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), *command]
    with tempfile.TemporaryFile("w+") as words:
        with subprocess.Popen(
            [binaries / "deepspeed", *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=words, text=True
        ) as process:
            yield process
            assert process.stdout is not None
            said = "" if process.stdout.closed else process.stdout.read()
            process.wait()
        _remove_shared_buffers()
        if process.returncode:
            words.seek(0)
            sys.exit(f"{said[-4000:]}{words.read()[-4000:]}")


def _remove_shared_buffers() -> None:
    """DeepSpeed's collectives over shared memory, which a rival may use, leave 66 MB a rank in /dev/shm."""
    for leftover in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        if leftover.stat().st_uid == os.getuid():
            leftover.unlink(missing_ok=True)
