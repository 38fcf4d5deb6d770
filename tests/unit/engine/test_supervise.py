"""What is started again, after which pause, on which hosts, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ds_train.checkpoint.manifest import MANIFEST, newest_step
from ds_train.config import RunConfig
from ds_train.engine.launch import Ended, World
from ds_train.engine.supervise import Policy, Supervisor, largest_launch
from ds_train.errors import UserError, user_error
from ds_train.plan.hostfile import Host

HOSTS = [Host(f"h{number}", (0, 1)) for number in range(4)]


class Runs:
    """Launches that end as told: (exit code, the step of a checkpoint that it leaves or None)."""

    def __init__(self, folder: Path, ends: Sequence[tuple[int, int | None]]) -> None:
        self.folder, self.ends = folder, list(ends)
        self.hosts: list[list[str]] = []
        self.overrides: list[list[str]] = []
        self.gone: set[str] = set()
        self.stopped: list[float] = []

    def find(self, hosts: Sequence[Host]) -> tuple[list[Host], World]:
        answering = [host for host in hosts if host.name not in self.gone]
        return answering, World(tuple(answering), "address", 1, "cpu")

    def start(self, world: World, more: Sequence[str]) -> Runs:
        self.hosts.append([host.name for host in world.hosts])
        self.overrides.append(list(more))
        return self

    def wait(self) -> Ended:
        code, step = self.ends.pop(0)
        if step is not None:
            checkpoint = self.folder / "checkpoints" / f"step-{step:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / MANIFEST).write_text("{}")
        return Ended(code, "h0", "why") if code else Ended(0)

    def stop(self, grace_s: float) -> None:
        self.stopped.append(grace_s)


@pytest.fixture
def make(recipe: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[Runs, Supervisor]]:
    def make(*ends: tuple[int, int | None], limit: int = 3, **sections: object) -> tuple[Runs, Supervisor]:
        run = recipe(**({"batch": {"global_samples": 8}} | sections))
        folder = Path(run.run_root) / run.name
        folder.mkdir(parents=True)
        runs = Runs(folder, ends)
        policy = Policy(limit, pause_s=0.0)
        return runs, Supervisor(run, policy, runs.find, runs.start, say=lambda text: None)

    return make


def restarts(runs: Runs) -> list[dict[str, object]]:
    path = runs.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("code", [0, 2])
def test_a_finished_run_and_a_users_error_are_not_started_again(
    make: Callable[..., tuple[Runs, Supervisor]], code: int
) -> None:
    runs, supervisor = make((code, None))
    assert supervisor.supervise(HOSTS).code == code
    assert restarts(runs) == []


@pytest.mark.parametrize("code", [1, 75, 76, 137, 255])
def test_a_failed_run_is_started_again_and_says_so(make: Callable[..., tuple[Runs, Supervisor]], code: int) -> None:
    runs, supervisor = make((code, 20), (0, None))
    assert supervisor.supervise(HOSTS).code == 0
    (line,) = restarts(runs)
    expected = {"kind": "restart", "step": 20, "exit_code": code, "host": "h0", "reason": "why", "ranks": 8}
    assert line.items() >= expected.items()


def test_failures_in_a_row_without_a_checkpoint_are_limited(make: Callable[..., tuple[Runs, Supervisor]]) -> None:
    runs, supervisor = make((1, None), (1, None), (1, 5), (1, None), (1, None), (1, None), limit=3)
    assert supervisor.supervise(HOSTS).code == 1
    assert [line["failures_in_a_row"] for line in restarts(runs)] == [1, 2, 1, 2, 3]
    assert runs.ends == []


def test_a_restart_goes_on_from_its_own_checkpoint_whatever_the_run_began_from(
    make: Callable[..., tuple[Runs, Supervisor]],
) -> None:
    runs, supervisor = make((1, None), (1, 5), (0, None))
    supervisor.supervise(HOSTS)
    assert runs.overrides == [[], [], ["checkpoint.resume=auto"]]


def test_a_host_that_is_gone_is_left_out_and_taken_back(make: Callable[..., tuple[Runs, Supervisor]]) -> None:
    runs, supervisor = make((255, 4), (1, 8), (0, None))
    runs.gone = {"h1"}
    wait = runs.wait

    def waiting() -> Ended:
        ended = wait()
        runs.gone = set() if len(runs.hosts) == 2 else runs.gone
        return ended

    runs.wait = waiting  # type: ignore[method-assign]
    supervisor.supervise(HOSTS)
    # Three hosts of two ranks can't share 8 samples: one more is left out.
    assert runs.hosts == [["h0", "h2"], ["h0", "h2"], ["h0", "h1", "h2", "h3"]]


def test_pauses_double_up_to_a_limit() -> None:
    policy = Policy(pause_s=10, longest_s=100)
    assert [policy.pause(count) for count in (1, 2, 3, 4, 5, 2000)] == [10, 20, 40, 80, 100, 100]


def test_told_to_stop_it_stops_the_ranks_and_starts_nothing(make: Callable[..., tuple[Runs, Supervisor]]) -> None:
    runs, supervisor = make((75, 4))
    wait = runs.wait

    def waiting() -> Ended:
        supervisor.stop()
        supervisor.stop()
        return wait()

    runs.wait = waiting  # type: ignore[method-assign]
    assert supervisor.supervise(HOSTS).code == 75
    assert runs.stopped == [130.0, 0.0]
    assert restarts(runs) == []


def test_told_to_stop_while_it_starts_the_ranks_it_stops_them(
    make: Callable[..., tuple[Runs, Supervisor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, supervisor = make((75, 4))
    start = runs.start

    def starting(world: World, more: Sequence[str]) -> Runs:
        supervisor.stop()
        return start(world, more)

    monkeypatch.setattr(supervisor, "_start", starting)
    assert supervisor.supervise(HOSTS).code == 75
    assert runs.stopped == [130.0]


def test_hosts_that_are_all_gone_for_a_while_are_waited_for(make: Callable[..., tuple[Runs, Supervisor]]) -> None:
    runs, supervisor = make((255, 4), (0, None))
    find, looked = runs.find, []

    def finding(hosts: Sequence[Host]) -> tuple[list[Host], World]:
        looked.append(len(runs.hosts))
        if len(looked) in (2, 3):
            raise user_error("hostfile", "no host answers")
        return find(hosts)

    supervisor._find = finding
    assert supervisor.supervise(HOSTS).code == 0
    assert looked == [0, 1, 1, 1]
    assert [line["failures_in_a_row"] for line in restarts(runs)] == [1, 2, 3]


@pytest.mark.parametrize("launches", [0, 1])
def test_hosts_that_stay_away_are_said_to(make: Callable[..., tuple[Runs, Supervisor]], launches: int) -> None:
    """Before the first launch at once, since the hostfile may be wrong."""
    runs, supervisor = make(*[(1, None)] * launches, limit=3)
    find, looked = runs.find, []

    def finding(hosts: Sequence[Host]) -> tuple[list[Host], World]:
        looked.append(hosts)
        if len(looked) > launches:
            raise user_error("hostfile", "no host answers")
        return find(hosts)

    supervisor._find = finding
    with pytest.raises(UserError, match="no host answers"):
        supervisor.supervise(HOSTS)
    assert len(looked) == (4 if launches else 1)


def test_no_host_can_carry_the_recipe(recipe: Callable[..., RunConfig]) -> None:
    world = World(tuple(HOSTS), "address", 1, "cpu")
    with pytest.raises(UserError, match=r"parallel\.tensor"):
        largest_launch(recipe(parallel={"tensor": 16}), world)


def test_the_newest_checkpoint_with_a_manifest(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000004", "step-00000012", "step-00000016.partial", "step-00000020.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    (tmp_path / "step-00000024").mkdir()
    assert newest_step(tmp_path) == 12
