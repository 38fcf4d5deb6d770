"""One run in a folder at a time: two that write the same metrics and checkpoints would spoil both."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ds_train.engine.ranks import RankInfo, on_main_first
from ds_train.errors import user_error

LOCK = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path, info: RankInfo) -> Iterator[None]:
    """Hold a run's folder on rank 0 inside of the block, or until the process ends in whatever way. Collective.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as held:
        on_main_first(info, lambda: _hold(folder, held))
        yield


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    try:
        file: IO[str] = held.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        reason = f"another run of this name is at work in {folder} ({file.read().strip()})"
        raise user_error("name", reason, "give this one another `name`, or end that one first", folder.name) from None
    except OSError:  # a file system without locks
        return
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
