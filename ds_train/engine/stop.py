"""A run that is told to stop: who was told, that all ranks stop after the same step, and that they do so in time."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from ds_train.errors import STOPPED_CODE, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop. Slurm sends the last one ahead of a time limit (`sbatch --signal=USR1@120`)."""

_LOOK_EVERY_S = 1.0
_NEW_SIGINT_AFTER_S = 1.0


class StopRequest:
    """Hears that this rank should stop, from a signal or from the end of the launcher above it.

    DeepSpeed's launcher hands SIGTERM and SIGINT to one rank after the other and kills each 30 seconds later
    (launcher/launch.py, terminate_process_tree). So no rank ends by itself: `requested` travels with a collective that
    each step has anyway, and all ranks stop together.

    A second Ctrl-C ends this rank at once.
    """

    def __init__(self, grace_s: float) -> None:
        self.reason: str | None = None
        """What asked this rank to stop."""
        self.agreed = False
        """Whether all ranks know; the step loop has ended."""
        self._grace_s, self._since = grace_s, 0.0
        self._first: int | None = None
        self._handlers: dict[int, Any] = {}
        self._left = threading.Event()
        self._launchers = _launchers()

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop."""
        return self.reason is not None

    def check(self, then: str) -> None:
        """End here on all ranks, if any was told to; `then` says what becomes of the work. Collective.

        Raises:
            Stopped: on all ranks.
        """
        import torch
        from deepspeed.accelerator import get_accelerator

        from ds_train.engine.ranks import all_sum

        asked = torch.tensor(int(self.requested), device=get_accelerator().current_device_name())
        self.agreed = self.agreed or bool(all_sum(asked))
        if self.agreed:
            raise Stopped(f"told to stop ({self.reason or 'another rank was'}): {then}")

    def __enter__(self) -> StopRequest:
        # A thread reads the signals' numbers: Python's own handlers run only between two instructions of the main
        # thread, which may be waiting in a collective for a rank that will never come.
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, _heard_elsewhere)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        _hearing.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _hearing.remove(self)
        for number, handler in self._handlers.items():
            # A launcher tells ranks that were told already; while one ends, that must not become its exit code.
            ending = self.agreed and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        # A forked child has this end of the pipe as well, so closing it may be no end for the thread.
        self._left.set()
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _listen(self) -> None:
        while not self._left.is_set():
            ready, _, _ = select.select([self._reader], [], [], _LOOK_EVERY_S)
            if ready:
                for number in os.read(self._reader, 64):
                    self._hear(number)
            elif not self.requested and _any_gone(self._launchers):
                self._ask("the end of its launcher")
            if self.requested and time.monotonic() - self._since > self._grace_s:
                self._give_up()

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        if not self.requested:
            self._first = number
            self._ask(signal.Signals(number).name)
        elif number == signal.SIGINT == self._first and time.monotonic() - self._since > _NEW_SIGINT_AFTER_S:
            os._exit(128 + signal.SIGINT)

    def _ask(self, reason: str) -> None:
        self._since, self.reason = time.monotonic(), reason

    def _give_up(self) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"rank {rank}: {self.reason} was {self._grace_s:g} s ago and the step isn't over; it ends unsaved, here:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(STOPPED_CODE)


def _heard_elsewhere(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the signal to be read by the thread."""


_hearing: list[StopRequest] = []
_mask = threading.local()


def _hold() -> None:
    """Before a fork: a signal to the child must not be heard while it still has this process's pipe."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _forget() -> None:
    """A forked child is no rank: what ends it is not meant for the run."""
    if _hearing:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _hearing.clear()
    _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)


def _launchers() -> list[psutil.Process]:
    """DeepSpeed's launch.py above this process, and its runner above that; none of another launcher."""
    parents = psutil.Process().parents()[:2]
    if not parents or "deepspeed.launcher.launch" not in _command(parents[0]):
        return []
    runner = parents[1:] if any(Path(word).name == "deepspeed" for word in _command(parents[-1])) else []
    return [parents[0], *runner]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _any_gone(launchers: list[psutil.Process]) -> bool:
    """Whether one has ended. A runner that is killed leaves launch.py and its ranks alone, and they would train on."""
    try:
        return not all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in launchers)
    except psutil.NoSuchProcess:
        return True
