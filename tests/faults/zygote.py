"""Ranks that start within a second: forks of this process, which has imported everything.

Reads a launch as a line of JSON from its input; writes a line with the ranks' process ids, and one with their exit
codes when all have ended. `acts` of a launch strike a rank at a chosen call of a chosen function.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What a run imports along its way.
WARM = (
    "ds_train.checkpoint.hf", "ds_train.checkpoint.native", "ds_train.data.prepare", "ds_train.engine.build",
    "ds_train.engine.contract", "ds_train.engine.job", "ds_train.engine.loop", "ds_train.track.tracker",
    "transformers.models.gpt2.modeling_gpt2", "deepspeed.runtime.pipe.engine", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.module_inject.auto_tp", "datasets",
)  # fmt: skip


def strike(act: Mapping[str, Any], result: Any = None) -> None:
    """Do what an act says to this process: a signal's name, `hang`, or `spoil` a weight of what the function gave."""
    time.sleep(act["delay"])
    if act["do"] == "hang":
        time.sleep(3600)
    elif act["do"] == "spoil":
        result.model.get_output_embeddings().weight.data.view(-1)[3] += 1e-3
    else:
        os.kill(os.getpid(), getattr(signal, act["do"]))
        time.sleep(0.2)  # a signal that only asks is heard by a thread


def lay(act: Mapping[str, Any]) -> None:
    """Let `act` strike at call number `call` of the function `at`: before, during or after it."""
    module, _, path = act["at"].partition(":")
    *outer, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for part in outer:
        holder = getattr(holder, part)
    original: Callable[..., Any] = getattr(holder, name)
    left = [act["call"]]

    def struck(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0]:
            return original(*arguments, **keywords)
        if act["when"] == "during":
            threading.Thread(target=strike, args=(act,), daemon=True).start()
        if act["when"] == "before":
            strike(act)
        result = original(*arguments, **keywords)
        if act["when"] == "after":
            strike(act, result)
        return result

    setattr(holder, name, struck)


class _Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def respect_modes() -> None:
    """Let root's processes ask for the modes of files as others' do (capabilities DAC_OVERRIDE and DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (_Capabilities * 2)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    data[0].effective &= ~(1 << 1 | 1 << 2)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def be_rank(rank: int, launch: Mapping[str, Any]) -> int:
    """Train the launch's recipe as `rank`."""
    output = os.open(f"{launch['logs']}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    size = str(launch["ranks"])
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launch["port"]))
    for act in launch["acts"]:
        if act["rank"] == rank:
            lay(act)
    if launch["ordinary"]:
        respect_modes()
    from ds_train.engine.job import run_job

    return run_job(launch["recipe"], [*launch["overrides"], *launch["own_overrides"].get(str(rank), ())])


def fork(rank: int, launch: Mapping[str, Any]) -> int:
    """Process id of a new rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = be_rank(rank, launch)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], timeout_s: float, settle_s: float) -> list[int]:
    """Exit codes, negative for signals. When one ends badly, the others get `settle_s` more."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + settle_s)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def main() -> None:
    for module in WARM:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        launch = json.loads(line)
        Path(launch["logs"]).mkdir(parents=True, exist_ok=True)
        pids = [fork(rank, launch) for rank in range(launch["ranks"])]
        print(json.dumps(pids), flush=True)
        print(json.dumps(wait(pids, launch["timeout_s"], launch["settle_s"])), flush=True)


if __name__ == "__main__":
    main()
