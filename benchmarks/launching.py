"""Starts the deepspeed launcher for benchmarks, and cleans up behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_train.engine.port import free_port

ROOT = Path(__file__).resolve().parent.parent


def launch(command: Sequence[str], ranks: int, threads: int = 1, timeout_s: float = 3600) -> str:
    """Run a script under the deepspeed launcher on CPU ranks; its output. Ends this process with it on failure."""
    binaries = Path(sys.executable).parent
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{binaries}{os.pathsep}{env['PATH']}"
    arguments = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), *command]
    done = subprocess.run(
        [binaries / "deepspeed", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s
    )
    _remove_shared_buffers()
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    return done.stdout


def _remove_shared_buffers() -> None:
    """DeepSpeed's collectives over shared memory, which a rival may use, leave 66 MB a rank in /dev/shm."""
    for leftover in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        if leftover.stat().st_uid == os.getuid():
            leftover.unlink(missing_ok=True)
