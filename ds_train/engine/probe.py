"""`python -m ds_train.engine.probe look|listen|meet`: what a host is and has, as JSON, in a few tenths of a second.

A request, JSON too, comes by the standard input. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from ds_train.engine.network import addresses, interface_to, is_free, nccl_interface
from ds_train.engine.port import free_port
from ds_train.plan.topology import device_here

LIBRARIES = ("torch", "deepspeed", "transformers")
MARK = ".ds-train-seen-"
_CONNECT_TIMEOUT_S = 5.0
_SHARED_WITHIN_S = 5.0
"""How long a file may take to show on other hosts: network file systems remember for seconds what isn't there."""


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Facts of this host.

    `request`: {"port": wished for, "device": set by hand or None, "folders": to write to, "files": to be the same on
    all hosts, "paths": to be there}.
    """
    return {
        "time": time.time(),
        "name": socket.gethostname(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "project": project_digest(),
        "device": request["device"] or device_here(),
        "devices": devices(),
        "cores": len(os.sched_getaffinity(0)),
        "addresses": addresses(),
        "port": request["port"] if is_free(request["port"]) else free_port(),
        "files": {name: _digest([Path(name).expanduser()]) for name in request["files"]},
        "missing": [name for name in request["paths"] if not Path(name).expanduser().exists()],
        "folders": {name: _room(name) for name in request["folders"]},
        "interfaces": sorted(psutil.net_if_addrs()),
        "nccl": nccl_interface(),
    }


def devices() -> int | None:
    """NVIDIA devices of this host, visible to this process or not; None where only their libraries could count."""
    if device_here() != "cuda":
        return None
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def project_digest() -> str:
    """Digest of this project's code and kernels, by which two copies of one version are told apart."""
    found = [find_spec(name) for name in ("ds_train", "ds_kernels")]  # whose import would be torch's
    folders = [Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None]
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    ]
    return str(_digest(sorted(files)))


def _digest(files: Sequence[Path]) -> str | None:
    """Digest of the contents; None where one can't be read."""
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(path.read_bytes() + b"\0")
    except OSError:
        return None
    return digest.hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def standing(folder: str) -> Path:
    """`folder`, or where it isn't there yet the nearest one above it that is."""
    path = Path(folder).expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _room(folder: str) -> dict[str, Any]:
    place = standing(folder)
    return {"place": str(place), "writable": os.access(place, os.W_OK), "free": shutil.disk_usage(place).free}


# -- two hosts at once -----------------------------------------------------------------------------------------------


def listen(request: dict[str, Any]) -> dict[str, Any]:
    """Listen on the port, with a marker in each folder, until the standard input ends.

    `request`: {"port", "folders", "mark"}. Prints `{"ready": true}` first, or what failed.
    """
    with contextlib.ExitStack() as stack:
        places = {}
        for name in request["folders"]:
            with contextlib.suppress(OSError):
                places[name] = str(stack.enter_context(_marked(standing(name) / f"{MARK}{request['mark']}")))
        server = stack.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", request["port"]))
        server.listen(1024)
        print(json.dumps({"ready": True, "marks": places}), flush=True)
        sys.stdin.read()
    return {}


@contextlib.contextmanager
def _marked(path: Path) -> Iterator[Path]:
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def meet(request: dict[str, Any]) -> dict[str, Any]:
    """Whether this host reaches the listener and sees its markers.

    `request`: {"address", "port", "marks": {folder: path}}.
    """
    blocked = None
    try:
        socket.create_connection((request["address"], request["port"]), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        blocked = str(error) or type(error).__name__
    deadline = time.monotonic() + _SHARED_WITHIN_S
    unseen = {name for name, path in request["marks"].items() if not _seen(Path(path), deadline)}
    return {"blocked": blocked, "unseen": sorted(unseen), "interface": interface_to(request["address"])}


def _seen(path: Path, deadline: float) -> bool:
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(path.parent if path.parent.is_dir() else "/")  # makes a network file system look again
        time.sleep(0.2)
    return True


_ACTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"look": look, "listen": listen, "meet": meet}


if __name__ == "__main__":
    action = _ACTIONS[sys.argv[1]]
    # `listen` waits for the end of the input, the others for its first line.
    print(json.dumps(action(json.loads(sys.stdin.readline()))), flush=True)
