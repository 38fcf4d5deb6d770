"""A rank that trains a recipe, and what strikes it on the way: `Place.train` starts it."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any


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


def main() -> int:
    launch = json.loads(sys.argv[1])
    rank = os.environ["RANK"]
    for act in launch["acts"]:
        if act["rank"] == int(rank):
            lay(act)
    if launch["ordinary"]:
        respect_modes()
    if launch["command"] == "train":
        from ds_train.engine.job import run_job

        return run_job(launch["recipe"], launch["own_overrides"].get(rank, []))
    from ds_train.cli import main as ds_train

    sys.argv = ["ds-train", launch["command"], launch["recipe"]]
    ds_train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
