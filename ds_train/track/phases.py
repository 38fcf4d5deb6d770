"""Where the time of a step goes: data, forward, backward, collectives, neighbours in a pipeline, optimizer, the rest.

A rank is in one phase at a time, and the innermost counts: a gather of parameters within a forward pass is time of
collectives. On a CPU phases end by the clock. On a device they end by events that its stream passes, so nothing waits
for it: what a device does while its stream goes on with other work (a reduction that overlaps the backward pass) costs
no time and counts as none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any, Literal, get_args

Phase = Literal["data", "forward", "backward", "collectives", "pipeline", "optimizer", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""`data`: waiting for micro-batches; `pipeline`: sending to and waiting for neighbour stages, idle time included."""

_ON_STREAMS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
    "scatter", "send", "recv",
)  # fmt: skip
"""Functions of torch.distributed that put a collective on the current stream of a device."""

_SPANS_HELD = 10_000


class StepClock:
    """Splits the time between `start` and `stop` into phases. Used by the thread that trains.

    `with clock("forward"): ...` costs about a microsecond on a CPU, two recorded events on a device.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        """`make_event` makes a device's timing event; None measures by this process's clock."""
        self._make_event = make_event
        self.thread = threading.get_ident()
        """The thread that trains."""
        self._stack: list[Phase] = []
        self._since: Any = None
        self.steps = 0
        """Steps that have ended."""
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._taken = dict(self._seconds)
        self._spans: list[tuple[Phase, Any, Any]] = []
        self._free: list[Any] = []
        self._contexts = {phase: _InPhase(self, phase) for phase in PHASES}

    def __call__(self, phase: Phase) -> _InPhase:
        """A context in which `phase` goes on."""
        return self._contexts[phase]

    def start(self) -> None:
        """A step begins, in this thread."""
        self.thread = threading.get_ident()
        if len(self._spans) > _SPANS_HELD:
            self.so_far()
        self._stack = ["other"]
        self._since = self._now()

    def stop(self) -> None:
        """The step has ended; what follows counts for nothing until `start`."""
        if self._stack:
            self._charge(self._now())
            self._stack = []
            self.steps += 1

    def enter(self, phase: Phase) -> None:
        """`phase` begins within the one that goes on; outside of steps nothing happens."""
        if self._stack:
            self._charge(self._now())
            # What a pipeline's neighbours exchange is one thing, whatever carries it.
            self._stack.append("pipeline" if self._stack[-1] == "pipeline" else phase)

    def leave(self) -> None:
        """The innermost phase ends."""
        if len(self._stack) > 1:
            self._charge(self._now())
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. A device is waited for, up to the last step's end."""
        before, self._taken = self._taken, self.so_far()
        return {phase: seconds - before[phase] for phase, seconds in self._taken.items()}

    def so_far(self) -> dict[str, float]:
        """Seconds of each phase since this clock was made; see `take`."""
        if self._spans:
            self._spans[-1][2].synchronize()
        for phase, begin, end in self._spans:
            self._seconds[phase] += begin.elapsed_time(end) / 1e3
        used = {id(event): event for _, begin, end in self._spans for event in (begin, end) if event is not self._since}
        self._free += used.values()
        self._spans = []
        return dict(self._seconds)

    def _now(self) -> Any:
        if self._make_event is None:
            return perf_counter()
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def _charge(self, now: Any) -> None:
        if self._make_event is None:
            self._seconds[self._stack[-1]] += now - self._since
        else:
            self._spans.append((self._stack[-1], self._since, now))
        self._since = now


class _InPhase:
    def __init__(self, clock: StepClock, phase: Phase) -> None:
        self._clock, self._phase = clock, phase

    def __enter__(self) -> None:
        self._clock.enter(self._phase)

    def __exit__(self, *_: object) -> None:
        self._clock.leave()


def step_clock(device: str) -> StepClock:
    """The clock of a rank that trains on `device`, by its name in torch."""
    if device == "cpu":
        return StepClock()
    import torch

    return StepClock(lambda: torch.Event(device, enable_timing=True))


@contextmanager
def collectives_timed(clock: StepClock, device: str) -> Iterator[None]:
    """Within it, waiting for torch's collectives is the phase "collectives", whoever calls them.

    Every wait of this process goes through `Work.wait`, blocking calls too (distributed_c10d.py). On a device these
    don't wait, but put themselves on the current stream; on another stream than the default one they overlap, and
    count where the default stream waits for that one.
    """
    import torch.distributed as dist
    from deepspeed.comm import comm

    places: list[tuple[Any, str]] = [(dist.Work, "wait")]
    if device != "cpu":
        places += [(dist, name) for name in _ON_STREAMS if hasattr(dist, name)]
        # Which of torch's functions DeepSpeed has chosen for them (comm/torch.py:116).
        places += [(comm.cdb, name) for name in ("all_gather_function", "reduce_scatter_function")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    counts = _in_the_step(clock) if device == "cpu" else _on_default_stream(clock, device)
    for owner, name, original in originals:
        setattr(owner, name, _timed(original, clock, counts))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def time_pipeline(engine: Any, clock: StepClock) -> None:
    """Let DeepSpeed's pipeline `engine` say which instruction of its schedule goes on."""
    from deepspeed.runtime.pipe import schedule

    phases: dict[type, Phase] = {
        schedule.LoadMicroBatch: "data",
        schedule.ForwardPass: "forward",
        schedule.BackwardPass: "backward",
        schedule.SendActivation: "pipeline",
        schedule.RecvActivation: "pipeline",
        schedule.SendGrad: "pipeline",
        schedule.RecvGrad: "pipeline",
        schedule.ReduceGrads: "collectives",
        schedule.ReduceTiedGrads: "collectives",
        schedule.OptimizerStep: "optimizer",
    }
    instructions: Mapping[type, Any] = type(engine)._INSTRUCTION_MAP

    def timed(run: Any, phase: Phase) -> Any:
        def instruction(self: Any, *arguments: Any, **named: Any) -> Any:
            with clock(phase):
                return run(self, *arguments, **named)

        return instruction

    # DeepSpeed binds what it finds there to the engine (pipe/engine.py:1385).
    engine._INSTRUCTION_MAP = {kind: timed(run, phases[kind]) for kind, run in instructions.items()}


def _timed(original: Any, clock: StepClock, counts: Callable[[], bool]) -> Any:
    @wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        if not counts():
            return original(*arguments, **named)
        with clock("collectives"):
            return original(*arguments, **named)

    return call


def _in_the_step(clock: StepClock) -> Callable[[], bool]:
    # Checkpoints are written, and their collectives waited for, by another thread.
    return lambda: threading.get_ident() == clock.thread


def _on_default_stream(clock: StepClock, device: str) -> Callable[[], bool]:
    import torch

    module = torch.get_device_module(device)

    def check() -> bool:
        # The backward pass of a device runs in a thread of torch's own, which Python calls a dummy.
        own = threading.get_ident() == clock.thread or isinstance(threading.current_thread(), threading._DummyThread)
        return own and bool(module.current_stream() == module.default_stream())

    return check
