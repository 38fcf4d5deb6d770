"""A source that gives nothing for hours: said, with the file, and the process ends, since ranks would wait for it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ds_train.errors import HUNG_CODE

Item = TypeVar("Item")
_LOOK_EVERY_S = 2.0


class _Wait:
    """What is being read, and since when the next item of it has been waited for; None while it isn't."""

    place = "the source"
    since: float | None = None


def in_time(read: Callable[[Callable[[str], None]], Iterator[Item]], limit_s: float) -> Iterator[Item]:
    """The items of `read(opened)`, which calls `opened` with whatever it opens.

    When one takes longer than `limit_s`, this process ends with exit code `HUNG_CODE`: a read that doesn't come back
    (a network file system whose server is gone, say) can't be broken off from within.
    """
    wait, over = _Wait(), threading.Event()

    def opened(place: str) -> None:
        wait.place = place

    def watch() -> None:
        while not over.wait(min(_LOOK_EVERY_S, limit_s / 4)):
            since = wait.since
            if since is not None and time.monotonic() - since > limit_s:
                _give_up(wait.place, limit_s)

    threading.Thread(target=watch, name="in-time", daemon=True).start()
    try:
        items = read(opened)
        while True:
            wait.since = time.monotonic()
            item = next(items, over)
            wait.since = None
            if item is over:
                return
            yield item  # type: ignore[misc]
    finally:
        over.set()


def _give_up(place: str, limit_s: float) -> None:
    print(
        f"reading the data hangs: nothing has come from {place} for {limit_s:g} s (faults.first_step_seconds), here:",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    os._exit(HUNG_CODE)
