"""The clock of a step: exclusive phases that make up the step, whoever waits, and nothing outside of it."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from ds_train.track import phases
from ds_train.track.phases import StepClock, time_pipeline


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Event:
    """A device's event: the time at which its stream passes it, which is known once the stream has."""

    made = recorded = passed = 0

    def __init__(self, time: Time) -> None:
        self._time, self._at, self._number = time, -1.0, 0
        Event.made += 1

    def record(self) -> None:
        Event.recorded += 1
        self._at, self._number = self._time.now, Event.recorded

    def synchronize(self) -> None:
        Event.passed = self._number

    def elapsed_time(self, end: Event) -> float:
        assert max(self._number, end._number) <= Event.passed, "the stream isn't there yet"
        return 1e3 * (end._at - self._at)


@pytest.fixture(params=["host", "device"])
def timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[StepClock, Time]:
    time = Time()
    if request.param == "device":
        return StepClock(lambda: Event(time)), time
    monkeypatch.setattr(phases, "perf_counter", time)
    return StepClock(), time


def test_the_innermost_phase_counts_and_all_of_them_make_up_the_step(timed: tuple[StepClock, Time]) -> None:
    clock, time = timed
    for _ in range(2):
        time.now += 100.0  # between steps
        clock.start()
        time.now += 1.0
        with clock("forward"):
            time.now += 2.0
            with clock("collectives"):
                time.now += 4.0
            time.now += 8.0
        with clock("pipeline"):
            time.now += 16.0
            with clock("collectives"):
                time.now += 32.0
        clock.stop()
    with clock("backward"):
        time.now += 64.0
    spent = clock.take()
    assert {name: seconds for name, seconds in spent.items() if seconds} == pytest.approx(
        {"other": 2.0, "forward": 20.0, "collectives": 8.0, "pipeline": 96.0}
    )
    assert clock.steps == 2
    assert not any(clock.take().values())
    assert sum(clock.so_far().values()) == pytest.approx(126.0)


def test_a_phase_ends_where_its_body_raises(timed: tuple[StepClock, Time]) -> None:
    clock, time = timed
    clock.start()
    with suppress(ValueError), clock("forward"):
        time.now += 1.0
        raise ValueError
    time.now += 2.0
    clock.stop()
    spent = clock.take()
    assert (spent["forward"], spent["other"]) == (1.0, 2.0)


def test_events_are_used_again() -> None:
    time = Time()
    clock = StepClock(lambda: Event(time))
    made = []
    for _ in range(4):
        clock.start()
        with clock("forward"):
            time.now += 1.0
        clock.stop()
        clock.take()
        made.append(Event.made)
    assert made[-1] - made[-2] <= 1


def test_waits_count_on_the_thread_that_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    time = Time()
    monkeypatch.setattr(phases, "perf_counter", time)
    clock = StepClock()
    original = dist.Work.wait

    def wait(_: Any) -> None:
        time.now += 3.0

    monkeypatch.setattr(dist.Work, "wait", wait)
    with phases.collectives_timed(clock, "cpu"):
        clock.start()
        dist.Work.wait(None)
        saver = threading.Thread(target=lambda: dist.Work.wait(None))
        saver.start()
        saver.join()
        clock.stop()
    assert clock.take()["collectives"] == 3.0
    assert dist.Work.wait is wait
    monkeypatch.undo()
    assert dist.Work.wait is original


def test_every_instruction_of_a_pipeline_has_a_phase() -> None:
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    clock = StepClock()

    def instruction(kind: type) -> Any:
        return lambda engine, **named: (kind, named)

    instructions = {kind: instruction(kind) for kind in PipelineEngine._INSTRUCTION_MAP}
    engine: Any = type("Engine", (), {"_INSTRUCTION_MAP": instructions})()
    time_pipeline(engine, clock)
    seen: list[str] = []
    clock.enter = seen.append  # type: ignore[assignment,method-assign]
    for kind, run in engine._INSTRUCTION_MAP.items():
        assert run(SimpleNamespace(), buffer_id=3) == (kind, {"buffer_id": 3})
    assert len(seen) == len(PipelineEngine._INSTRUCTION_MAP) == 10
    assert engine._INSTRUCTION_MAP[schedule.RecvGrad] is not instructions[schedule.RecvGrad]
