"""A run that hangs says where, names the late rank, and ends: a dead rank must not keep the others for hours.

Every rank's step, and its wait for the step's samples, is timed by a thread of its own. When one takes far too long, or
a rank no longer answers, all ranks write their stacks and last collectives to RUN/faults and tell rank 0 what they are
at, through the store at which they met, since collectives are what hangs. Nothing is added to a step but four readings
of the clock.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ds_train.config.faults import FaultsSection
from ds_train.data.batches import LOADER, prefetch
from ds_train.engine.ranks import RankInfo
from ds_train.errors import HUNG_CODE

if TYPE_CHECKING:
    from torch.distributed import Store

_WINDOW = 50
_LOOK_EVERY_S = 2.0
_ANSWER_S = 10.0
"""How long rank 0 waits for the other ranks' words after the alarm."""
_OWN_THREADS = ("watchdog", "beat", "stop", "checkpoint")
_HOME = str(Path(__file__).parents[1])
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Pace:
    """How long a step may take: a factor times the median of the last ones per token, but for the first of a kind.

    A wait for samples is timed as a step of one token.
    """

    def __init__(self, section: FaultsSection) -> None:
        self._section = section
        self._seconds_per_token: deque[float] = deque(maxlen=_WINDOW)
        self._known: set[Any] = set()

    def limit(self, kind: Any, tokens: int) -> float:
        """Seconds that a step of `tokens` may take; steps of another `kind` may be compiled first."""
        section = self._section
        if kind not in self._known:
            return max(section.first_step_seconds, section.late_floor_seconds)
        usual = statistics.median(self._seconds_per_token) * tokens
        return max(section.late_floor_seconds, section.late_factor * usual)

    def add(self, kind: Any, tokens: int, seconds: float) -> None:
        """A step that has ended; the first of its kind says nothing about the others."""
        if kind in self._known or not self._seconds_per_token:
            self._seconds_per_token.append(seconds / tokens)
        self._known.add(kind)


@dataclass(frozen=True)
class Report:
    """What a rank is at: its step (0 before the first), since when (s), the innermost place, whether it waits there for
    other ranks, and how many collectives each of its groups has begun."""

    rank: int
    host: str
    step: int
    seconds: float
    place: str
    waits: bool
    collectives: dict[str, int]


@dataclass(frozen=True)
class _Phase:
    """A step, or the wait for its samples: `what` it is in words, and the pace that it is measured by."""

    what: str
    pace: Pace
    kind: Any
    tokens: int
    started: float
    limit: float


class Watchdog:
    """Watches the steps of this rank, and with the other ranks' watchdogs that every one still answers.

    What lies between steps (evaluation, saving, export) may take as long as it does, as long as every rank answers;
    but each wait for samples is timed there too.
    """

    def __init__(self, section: FaultsSection, info: RankInfo, folder: Path, tell: Callable[[str], None]) -> None:
        """`tell` gets the verdict on rank 0, from a thread, before the process ends."""
        self._section, self._info, self._folder, self._tell = section, info, folder, tell
        self._steps, self._waits = Pace(section), Pace(section)
        self._phase: _Phase | None = None
        self._last = 0
        self._since = self._answered = time.monotonic()
        self._alarm: str | None = None
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        self._look_every_s = min(_LOOK_EVERY_S, section.late_floor_seconds / 4)
        if info.ranks > 1:
            self._threads.append(threading.Thread(target=self._beat, name="beat", daemon=True))

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """In order, all ranks leave together: rank 0's end is the end of the store."""
        faulthandler.cancel_dump_traceback_later()
        self._phase = None
        if error is None:
            from ds_train.engine.ranks import barrier

            barrier()
        self._closing.set()
        self._threads[0].join()

    def begin(self, number: int, kind: Any, tokens: int) -> None:
        """The work of step `number` begins, over `tokens` of all ranks."""
        self._begin(f"step {number}", number, self._steps, kind, tokens)

    def begin_wait(self, number: int, file: Path) -> None:
        """The wait for samples of `file` begins, which step `number` trains on or is evaluated by."""
        self._begin(f"loading the data of step {number} from {file}", number, self._waits, None, 1)

    def _begin(self, what: str, number: int, pace: Pace, kind: Any, tokens: int) -> None:
        limit = pace.limit(kind, tokens)
        self._since = time.monotonic()
        self._last, self._phase = number, _Phase(what, pace, kind, tokens, self._since, limit)
        # Where a thread of Python can't run, since another one holds the interpreter, this one of C still does.
        faulthandler.dump_traceback_later(1.5 * limit + 2 * _ANSWER_S, exit=True, file=sys.__stderr__ or 2)

    def end(self, whole: bool = True) -> None:
        """It has ended, or was given up; what comes until the next one may take its time."""
        faulthandler.cancel_dump_traceback_later()
        phase, self._phase = self._phase, None
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        if phase is not None and whole:
            phase.pace.add(phase.kind, phase.tokens, seconds)

    def _watch(self) -> None:
        while not self._closing.wait(self._look_every_s):
            phase, now = self._phase, time.monotonic()
            if phase is not None and now - phase.started > phase.limit:
                self._end(f"{phase.what} has taken {now - phase.started:.0f} s and may take {phase.limit:.0f} s")
            elif self._alarm is not None:
                self._end(self._alarm)
            elif self._info.ranks > 1 and now - self._answered > self._section.late_floor_seconds:
                self._end(f"rank 0 hasn't answered for {now - self._answered:.0f} s")

    def _beat(self) -> None:
        """Say that this rank is there, listen for an alarm; rank 0 looks whether the others are there."""
        others = range(1, self._info.ranks) if self._info.is_main else ()
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        beats = itertools.count()
        try:
            store = self._connect()
            while not self._closing.wait(self._look_every_s):
                store.set(f"beat/{self._info.rank}", str(next(beats)))
                self._alarm = store.get("alarm").decode() if store.check(["alarm"]) else self._silent(store, heard)
                if self._alarm is not None:
                    return
                self._answered = time.monotonic()
        except RuntimeError:  # the store is gone, and with it rank 0: `_watch` will say so
            return

    def _silent(self, store: Store, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """Which rank has been silent for too long; `heard` are the last beats of each, and since when."""
        now = time.monotonic()
        for rank, (before, since) in heard.items():
            beat = store.get(f"beat/{rank}") if before or store.check([f"beat/{rank}"]) else b""
            if beat != before:
                heard[rank] = beat, now
            elif now - since > self._section.late_floor_seconds:
                return f"rank {rank} hasn't answered for {now - since:.0f} s"
        return None

    def _connect(self) -> Store:
        """A connection of its own to the store of rank 0: the main thread's may be in use by what hangs."""
        import torch.distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        return dist.PrefixStore("ds_train/watchdog", store)

    def _end(self, reason: str) -> None:
        """Write down where this rank is, hear and tell where the others are, and end the process."""
        try:
            self._tell_all(reason)
        except Exception:  # whatever it is, the run must not go on hanging
            traceback.print_exc()
        os._exit(HUNG_CODE)

    def _tell_all(self, reason: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        report = self._report()
        self._write_stacks(reason, report)
        verdict = [f"{reason}; {name_late([report], 1)}"] if self._info.ranks == 1 else []
        if not verdict:
            exchange = threading.Thread(target=self._exchange, args=(reason, report, verdict), daemon=True)
            exchange.start()
            exchange.join(3 * _ANSWER_S + 2 * self._look_every_s)
        if self._info.is_main or not verdict:
            lost = f"{reason}; rank 0 gives no answer: dead, stopped, or its host is gone"
            self._say(verdict[0] if verdict else lost, report)

    def _say(self, verdict: str, report: Report) -> None:
        if self._info.is_main:
            self._tell(verdict)
        place = f"the run hangs (rank {report.rank} on {report.host}): {verdict}"
        print(f"{place}\nThe stacks of all ranks are in {self._folder}", file=sys.stderr, flush=True)

    def _exchange(self, reason: str, report: Report, verdict: list[str]) -> None:
        store = self._connect()
        store.set("alarm", reason)
        store.set(f"report/{self._info.rank}", json.dumps(asdict(report)))
        if not self._info.is_main:
            store.wait(["verdict"], timedelta(seconds=3 * _ANSWER_S))
            verdict.append(store.get("verdict").decode())
            return
        missing, deadline = set(range(self._info.ranks)), time.monotonic() + _ANSWER_S
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"report/{rank}"])}
            time.sleep(0.05)
        told = [store.get(f"report/{rank}") for rank in range(self._info.ranks) if rank not in missing]
        late = name_late([Report(**json.loads(one)) for one in told], self._info.ranks)
        text = f"{reason}; {late}"
        store.set("verdict", text)
        time.sleep(1.0)  # with this process the store ends, and the others want to read it
        verdict.append(text)

    def _report(self) -> Report:
        place, waits = _place()
        status = _status()
        if self._info.device != "cpu":
            # A collective of a device returns at once: whoever waits for it does so wherever a result is read.
            waits = any(one["last_completed_collective"] != one["last_enqueued_collective"] for one in status.values())
        collectives = {group: one["last_enqueued_collective"] for group, one in status.items()}
        seconds = time.monotonic() - self._since
        return Report(self._info.rank, socket.gethostname(), self._last, seconds, place, waits, collectives)

    def _write_stacks(self, reason: str, report: Report) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{self._info.rank:05d}.txt").open("w") as file:
                when = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{when} {reason}\n{json.dumps(asdict(report), indent=2)}\n\nlast collectives\n")
                file.writelines(line + "\n" for line in _last_collectives())
                file.write("\nstacks\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            print(f"rank {self._info.rank}: {self._folder} can't be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2)


def name_late(reports: Sequence[Report], ranks: int) -> str:
    """Which rank the others wait for, as far as their words say it, in a phrase."""
    silent = sorted(set(range(ranks)) - {report.rank for report in reports})
    if silent:
        return f"{_ranks(silent)} {_give(silent)} no answer: dead, stopped, or its host is gone"
    late = _behind(reports)
    if not late:
        places = sorted({report.place for report in reports})
        return "no rank is behind the others; they are at " + " and ".join(places)
    return "; ".join(f"late is rank {one.rank} on {one.host}, at step {one.step}, in {one.place}" for one in late)


def _behind(reports: Sequence[Report]) -> list[Report]:
    """Ranks that others wait for: at an older step, or busy while others wait, or with fewer collectives begun."""
    newest = max(report.step for report in reports)
    begun: dict[str, int] = {}
    for report in reports:
        for group, count in report.collectives.items():
            begun[group] = max(begun.get(group, 0), count)
    signs: list[Callable[[Report], bool]] = [
        lambda report: not report.waits,
        lambda report: report.step < newest,
        lambda report: any(count < begun[group] for group, count in report.collectives.items()),
    ]
    for sign in signs:
        late = [report for report in reports if sign(report)]
        if 0 < len(late) < len(reports):
            return late
    return list(reports) if len(reports) == 1 else []


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _give(numbers: Sequence[int]) -> str:
    return "gives" if len(numbers) == 1 else "give"


def _place() -> tuple[str, bool]:
    """(where the main thread is, or the one that loads what it waits for; whether any thread that computes is inside of
    a collective)."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    busy = {
        ident: frame
        for ident, frame in frames.items()
        if not any(names.get(ident, "").startswith(prefix) for prefix in _OWN_THREADS)
    }
    main = frames.get(threading.main_thread().ident or 0)
    if _waits_for_samples(main):
        main = next((frame for ident, frame in frames.items() if names.get(ident) == LOADER), main)
    return _words(main), any(_in_collective(frame) for frame in busy.values())


def _waits_for_samples(frame: FrameType | None) -> bool:
    """Whether it is the loader's thread that samples would come from."""
    while frame is not None and frame.f_code is not prefetch.__code__:
        frame = frame.f_back
    return frame is not None


def _words(frame: FrameType | None) -> str:
    """The innermost function, and the innermost one of this project that called it."""
    stack = traceback.extract_stack(frame)
    if not stack:
        return "an unknown place"
    inner = stack[-1]
    own = [entry for entry in stack if entry.filename.startswith(_HOME)]
    text = f"{inner.name} ({_short(inner.filename)}:{inner.lineno})"
    if own and own[-1] is not inner:
        text += f" called by {own[-1].name} ({_short(own[-1].filename)}:{own[-1].lineno})"
    return text


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])


def _in_collective(frame: FrameType) -> bool:
    stack = traceback.extract_stack(frame)
    return any(part in entry.filename for entry in stack[-8:] for part in _COLLECTIVES)


def _flight_records() -> Iterator[Mapping[str, Any]]:
    """What torch's flight recorders have kept of the collectives, NCCL's and the others'."""
    from torch._C import _distributed_c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            yield json.loads(dump())


def _status() -> dict[str, dict[str, int]]:
    """Numbers of the last collectives that each group has enqueued, started and completed."""
    return {
        group: {name: int(number) for name, number in numbers.items()}
        for record in _flight_records()
        for group, numbers in record.get("pg_status", {}).items()
    }


def _last_collectives(most: int = 20) -> Iterator[str]:
    for record in _flight_records():
        for entry in list(record.get("entries", ()))[-most:]:
            state = "done" if entry.get("retired") else entry.get("state")
            sizes = f"{entry.get('input_sizes')} -> {entry.get('output_sizes')}"
            group = " ".join(entry.get("process_group", ()))
            yield f"{entry.get('collective_seq_id', 0):>8} {entry.get('profiling_name')} in {group}: {sizes}, {state}"
