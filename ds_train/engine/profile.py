"""Steps i to j under torch's profiler: a trace of each chosen rank, and what it says. Only imported on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ds_train.config import RunConfig
from ds_train.engine.loop import StepResult
from ds_train.engine.ranks import RankInfo
from ds_train.errors import first_line
from ds_train.plan.make import RunPlan
from ds_train.track.findings import Operator, RankProfile, Setting, findings, operator_table
from ds_train.track.phases import StepClock
from ds_train.track.profile_page import profile_page
from ds_train.track.series import thin

_OPERATORS_KEPT = 60


def profiled(
    steps: Iterator[StepResult], run: RunConfig, plan: RunPlan, info: RankInfo, clock: StepClock, folder: Path,
    done: int, note: Callable[[str], None],
) -> Iterator[StepResult]:  # fmt: skip
    """`steps`, of which those of `track.profile_steps` are recorded into RUN/profile. Collective.

    Args:
        done: steps before the first of `steps`.
        note: says something to the user.
    """
    assert run.track.profile_steps is not None
    first, last = run.track.profile_steps
    window: _Window | None = None
    step = done
    try:
        while True:
            if step + 1 == max(first, done + 1) <= last:
                window = _Window(info, clock, info.rank in run.track.profile_ranks)
            result = next(steps, None)
            if result is None:
                return
            step = result.step
            if window is not None and step == last:
                _tell(window.end(folder / "profile"), run, plan, info, folder / "profile", note)
                window = None
            yield result
    finally:
        # A stop, a roll-back or a cut in the middle of it.
        if window is not None:
            window.give_up()


class _Window:
    """A recording that goes on."""

    def __init__(self, info: RankInfo, clock: StepClock, recorded: bool) -> None:
        self._info, self._clock, self._before, self._steps = info, clock, clock.so_far(), clock.steps
        self._profile: Any = None
        if recorded:
            activities = [ProfilerActivity.CPU]
            if info.device in ("cuda", "xpu", "hpu"):
                activities.append(getattr(ProfilerActivity, info.device.upper()))
            self._profile = torch_profile(activities=activities, profile_memory=True, acc_events=True)
            self._profile.start()

    def give_up(self) -> None:
        """Stop, and keep nothing."""
        if self._profile is not None:
            self._profile.stop()

    def end(self, folder: Path) -> RankProfile:
        """Stop, write this rank's trace, and say what it saw."""
        steps = self._clock.steps - self._steps
        spent = {phase: now - self._before[phase] for phase, now in self._clock.so_far().items()}
        phase_ms = {phase: 1e3 * seconds / steps for phase, seconds in spent.items()}
        rank = self._info.rank
        if self._profile is None:
            return RankProfile(rank, steps, phase_ms)
        self._profile.stop()
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(folder / f"rank-{rank}.trace.json.gz"))
        except (OSError, RuntimeError) as error:  # torch raises the second where a file can't be written
            problem = f"its trace can't be written: {first_line(error)}"
        return RankProfile(rank, steps, phase_ms, self._operators(), self._memory(), problem)

    def _operators(self) -> list[Operator]:
        on_device = self._info.device != "cpu"

        def self_ms(event: Any) -> float:
            return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3

        events = sorted(self._profile.key_averages(), key=self_ms, reverse=True)
        total = sum(map(self_ms, events)) or 1.0
        return [Operator(e.key, e.count, self_ms(e), self_ms(e) / total) for e in events[:_OPERATORS_KEPT]]

    def _memory(self) -> list[tuple[float, float]]:
        kinds = {"cpu": DeviceType.CPU, "cuda": DeviceType.CUDA, "xpu": DeviceType.XPU, "hpu": DeviceType.HPU}
        kind = kinds.get(self._info.device)
        events = [
            event
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == kind
        ]
        events.sort(key=lambda event: event.start_ns())
        if not events:
            return []
        times = np.array([(event.start_ns() - events[0].start_ns()) / 1e6 for event in events])
        held = np.cumsum([event.nbytes() / 2**20 for event in events])
        return list(zip(*(values.tolist() for values in thin(times, held)), strict=True))


def _tell(
    own: RankProfile, run: RunConfig, plan: RunPlan, info: RankInfo, folder: Path, note: Callable[[str], None]
) -> None:
    everyones: list[Any] = [None] * info.ranks
    dist.all_gather_object(everyones, own)
    if not info.is_main:
        return
    sentences = findings(everyones, _setting(run, plan))
    steps = run.track.profile_steps or (0, 0)
    for profile in everyones:
        if profile.problem:
            note(f"rank {profile.rank}: {profile.problem}")
    recorded = next((profile for profile in everyones if profile.operators), None)
    if recorded is not None:
        note(f"\noperators of rank {recorded.rank}, steps {steps[0]} to {steps[1]}:")
        for name, share, ms, calls in [("", "of all", "ms/step", "calls/step"), *operator_table(recorded)]:
            note(f"  {name:48.48} {share:>8} {ms:>10} {calls:>11}")
    note("")
    for sentence in sentences:
        note(f"- {sentence}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"steps": steps, "findings": sentences, "ranks": [asdict(profile) for profile in everyones]}
        (folder / "profile.json").write_text(json.dumps(summary), encoding="utf-8")
        (folder / "profile.html").write_text(profile_page(run.name, steps, everyones, sentences), encoding="utf-8")
        note(f"\nprofile: {folder / 'profile.html'}; traces for ui.perfetto.dev or chrome://tracing beside it")
    except OSError as error:
        note(f"the profile can't be written: {error}")


def _setting(run: RunConfig, plan: RunPlan) -> Setting:
    return Setting(
        workers=run.data.workers,
        zero_stage=plan.zero_stage,
        tensor=plan.layout.tensor,
        sequence=plan.layout.sequence,
        pipeline=plan.layout.pipe,
        micro_batches=plan.batch.accumulation,
        offload="offload_optimizer" in plan.deepspeed_json["zero_optimization"],
        compiled=run.model.compile,
        overlap=bool(plan.deepspeed_json["zero_optimization"].get("overlap_comm")),
    )
