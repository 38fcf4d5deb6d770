"""`ds-train supervise`: starts a run again from its checkpoint when it fails, with fewer hosts where some are gone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ds_train.checkpoint.manifest import newest_step
from ds_train.config import RunConfig
from ds_train.engine.hosts import LOST
from ds_train.engine.launch import Ended, Launch, World, handled
from ds_train.engine.session import placed
from ds_train.errors import EXIT_CODE, STOPPED_CODE, UserError, user_error
from ds_train.plan.clusters import cluster_of_hosts
from ds_train.plan.hostfile import Host
from ds_train.track.metrics import MetricsFile

MARGIN_S = 10.0
"""What a launch gives ranks beyond the grace time of their recipe, in which they end by themselves."""


@dataclass(frozen=True)
class Policy:
    """`limit` failures in a row that brought no new checkpoint end the supervision. Before the first restart it waits
    for `pause_s`, before each further one in a row twice as long, at most `longest_s`."""

    limit: int = 5
    pause_s: float = 10.0
    longest_s: float = 600.0

    def pause(self, failures: int) -> float:
        """Seconds to wait before the restart after so many failures in a row."""
        return float(min(self.longest_s, self.pause_s * 2.0 ** min(failures - 1, 60)))


_BETWEEN = Ended(STOPPED_CODE, "supervise", "told to stop between two launches")


class Started(Protocol):
    """A launch, as `engine.launch.Launch` is one."""

    def wait(self) -> Ended: ...
    def stop(self, grace_s: float) -> None: ...


class Supervisor:
    """Launches a run until it is finished, is told to stop, or can't be mended by starting it again."""

    def __init__(
        self,
        run: RunConfig,
        policy: Policy,
        find: Callable[[Sequence[Host]], tuple[list[Host], World]],
        start: Callable[[World, Sequence[str]], Started],
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """`find` looks which of some hosts answer and where ranks meet; `start` launches, with more overrides."""
        self._run, self._policy, self._find, self._start, self._say = run, policy, find, start, say
        self._folder = Path(run.run_root).expanduser() / run.name
        self._grace_s = run.faults.grace_seconds + MARGIN_S
        self._told = threading.Event()
        self._current: Started | None = None

    def stop(self, *_: object) -> None:
        """Let the ranks save and end; a second time kills them. For a signal handler."""
        grace_s = 0.0 if self._told.is_set() else self._grace_s
        self._told.set()
        if self._current is not None:
            self._current.stop(grace_s)

    def supervise(self, hosts: Sequence[Host]) -> Ended:
        """How the last launch ended. `hosts` are all that may be used; one that is gone is looked for each time.

        Raises:
            UserError: no legal launch on the hosts that are left, or none of them answers: at once before the first
                launch, and afterwards, when they may come back, at the last of the failures in a row.
        """
        failures, reached, ranks = 0, newest_step(self._folder / "checkpoints"), 0
        more: list[str] = []
        with handled(self.stop):
            while True:
                refused: UserError | None = None
                try:
                    world = self._world(hosts)
                except UserError as error:
                    if not ranks:
                        raise
                    refused = error
                    ended = Ended(LOST, "supervise", "; ".join(map(str, error.problems)))
                else:
                    ranks = world.ranks
                    ended = self._launched(world, more)
                if self._told.is_set() or (refused is None and ended.code in (0, EXIT_CODE)):
                    return _BETWEEN if refused is not None else ended
                before, reached = reached, newest_step(self._folder / "checkpoints")
                failures = 1 if reached > before else failures + 1
                if failures > self._policy.limit:
                    self._say(f"{failures} failures in a row brought no new checkpoint: given up")
                    if refused is not None:
                        raise refused
                    return ended
                if reached > before:
                    # Whatever the run began from, it has come further.
                    more = ["checkpoint.resume=auto"]
                pause = self._policy.pause(failures)
                self._note(reached, failures, pause, ended, ranks)
                if self._told.wait(pause):
                    return _BETWEEN

    def _launched(self, world: World, more: Sequence[str]) -> Ended:
        if self._told.is_set():
            return _BETWEEN
        self._current = self._start(world, more)
        if self._told.is_set():  # while it was being started, when there was nothing yet to stop
            self._current.stop(self._grace_s)
        return self._current.wait()

    def _world(self, hosts: Sequence[Host]) -> World:
        answering, world = self._find(hosts)
        gone = [host.name for host in hosts if host not in answering]
        fitting = largest_launch(self._run, world)
        left_out = [host.name for host in answering if host not in fitting.hosts]
        if gone:
            self._say(f"{', '.join(gone)}: no answer; going on without")
        if left_out:
            self._say(f"{', '.join(left_out)}: left out; the recipe can't be spread over as many ranks")
        return fitting

    def _note(self, step: int, failures: int, pause: float, ended: Ended, ranks: int) -> None:
        self._say(f"{ended}; starting again from step {step} in {pause:.0f} s (failure {failures} in a row)")
        record: Mapping[str, Any] = {
            "kind": "restart", "step": step, "exit_code": ended.code, "host": ended.host, "reason": ended.reason,
            "ranks": ranks, "failures_in_a_row": failures, "pause_seconds": pause, "time": time.time(),
        }  # fmt: skip
        MetricsFile(self._folder / "metrics.jsonl", self._say).write(record)


def largest_launch(run: RunConfig, world: World) -> World:
    """`world`, or with fewer of its hosts where the recipe can't be spread over all.

    Raises:
        UserError: what is wrong with all of them.
    """
    first: UserError | None = None
    for count in range(len(world.hosts), 0, -1):
        fewer = replace(world, hosts=world.hosts[:count])
        cluster = cluster_of_hosts([(host.name, len(host.slots)) for host in fewer.hosts])
        cluster = replace(cluster, device=world.device, here=not world.remote)
        try:
            placed(run, cluster)
        except UserError as error:
            first = first or error
        else:
            return fewer
    assert first is not None
    raise first


def find_hosts(
    run: RunConfig, recipe: str, hosts: Sequence[Host], address: str | None, port: int | None
) -> tuple[list[Host], World]:
    """Those of `hosts` that answer, and where their ranks meet.

    Raises:
        UserError: none answers, or what is wrong with those that do.
    """
    from ds_train.engine import survey

    if newest_step(Path(run.run_root).expanduser() / run.name / "checkpoints"):
        # It goes on from its own checkpoints, and what it began from may be gone.
        run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})
    found = survey.survey(hosts, port, run, recipe)
    answering = [host for host in hosts if host.name in found.facts]
    if not answering:
        reasons = "; ".join(str(answer.problem) for answer in found.answers.values())
        raise user_error("hostfile", f"no host answers: {reasons}", "see `ds-train doctor`")
    answers = {host.name: found.answers[host.name] for host in answering}
    found = replace(found, hosts=tuple(answering), answers=answers)
    survey.refuse(found.findings())
    return answering, found.world(address)


def start_run(recipe: str, overrides: Sequence[str]) -> Callable[[World, Sequence[str]], Launch]:
    """What launches the run."""
    return lambda world, more: Launch(world, ["ds_train.engine", recipe, *overrides, *more])
