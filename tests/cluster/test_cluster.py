"""Launches on several hosts: the losses of one host, the doctor's findings, and ends that leave nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from lab import Lab, tail
from ranks import ROOT

pytestmark = pytest.mark.cluster

SECRET = "not-to-be-seen-by-anybody"
ENDS_WITHIN_S = 60
ZERO_2 = ("parallel.zero_stage=2",)
PIPELINE = ("parallel.zero_stage=1", "parallel.pipeline=2")


def losses(recipe: str, name: str) -> list[float]:
    path = Path(recipe).parent / "runs" / name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [record["loss"] for record in records if record["kind"] == "train"]


def train(lab: Lab, recipe: str, name: str, *arguments: str) -> list[float]:
    done = lab.ds_train("launch", recipe, f"name={name}", *arguments)
    assert done.returncode == 0, tail([done.stdout, done.stderr])
    found = losses(recipe, name)
    assert len(found) == 6
    return found


@pytest.mark.parametrize(("layout", "slots"), [(ZERO_2, 1), (PIPELINE, 2)])
def test_two_hosts_end_with_the_losses_of_one(lab: Lab, recipe: str, layout: tuple[str, ...], slots: int) -> None:
    hosts = lab.hostfile(*(f"worker-{index} slots={slots}" for index in range(2)))
    two = train(lab, recipe, "two", *layout, "--hostfile", hosts)
    one = train(lab, recipe, "one", *layout, "--ranks", str(2 * slots))
    assert two == pytest.approx(one, rel=1e-6)
    assert two[-1] < two[0]


def test_deepspeeds_own_front_end_gives_them_too(lab: Lab, recipe: str) -> None:
    """`deepspeed --hostfile` over pdsh, with what docs/launching.md says it needs."""
    environment = lab.folder / "deepspeed_env"
    environment.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    hosts = lab.hostfile("worker-0 slots=1", "worker-1 slots=1")
    done = lab.run(
        "deepspeed", "--hostfile", hosts, "launch/train.py", recipe, "name=raw", *ZERO_2,
        env={"DS_ENV_FILE": str(environment)},
    )  # fmt: skip
    assert done.returncode == 0, tail([done.stdout, done.stderr])
    assert losses(recipe, "raw") == pytest.approx(train(lab, recipe, "one", *ZERO_2, "--ranks", "2"), rel=1e-6)


# -- ends ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_mid_run(lab: Lab, recipe: str, hosts: int, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A launch on so many hosts that has trained a few steps and would go on for hours."""
    hostfile = lab.hostfile(*(f"worker-{index} slots=1" for index in range(hosts)))
    command = [sys.executable, "-m", "ds_train.cli", "launch", recipe, "schedule.steps=1000000", "--hostfile", hostfile]
    sizes = ["batch.global_samples=6", "batch.micro_samples=1", *ZERO_2]
    process = subprocess.Popen(
        lab.command(*command, *sizes), env=lab.environment(env), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while len(losses(recipe, "tiny")) < 3:
            assert process.poll() is None, tail(process.communicate())
            assert time.monotonic() < deadline, "no step after 300 s"
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


def nothing_runs_on(lab: Lab, hosts: list[str], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while any(left := {host: lab.inside(host) for host in hosts}.values()):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.5)


def power_cut(lab: Lab) -> None:
    lab.kill("worker-2")


def unplugged(lab: Lab) -> None:
    lab.cut("worker-2")


@pytest.mark.parametrize("accident", [power_cut, unplugged])
def test_a_lost_host_ends_the_launch_everywhere(lab: Lab, recipe: str, accident: Callable[[Lab], None]) -> None:
    with in_mid_run(lab, recipe, 3) as launch:
        started = time.monotonic()
        accident(lab)
        _, errors = launch.communicate(timeout=ENDS_WITHIN_S + 30)
        left_s = ENDS_WITHIN_S - (time.monotonic() - started)
        print(f"{accident.__name__}: ended after {ENDS_WITHIN_S - left_s:.0f} s")
        assert left_s > 0
        nothing_runs_on(lab, list(lab.hosts), left_s)
    named = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(named) == 1, errors[-4000:]
    assert named[0].startswith("error: worker-2: the connection is lost")
    assert launch.returncode != 0
    lab.boot("worker-2")
    lab.wait_for_sshd("worker-2")


def test_a_killed_launch_leaves_nothing_running_and_secrets_stay_secret(lab: Lab, recipe: str) -> None:
    with in_mid_run(lab, recipe, 2, WANDB_API_KEY=SECRET) as launch:
        rank = next(process for process in ranks_of(lab, "worker-1"))
        assert rank.environ()["WANDB_API_KEY"] == SECRET
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                assert SECRET not in " ".join(process.cmdline())
        launcher = psutil.Process(launch.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            if "ds_train.cli" in " ".join(process.cmdline()):
                process.kill()
        nothing_runs_on(lab, ["worker-0", "worker-1"], ENDS_WITHIN_S)
        output = "".join(launch.communicate())
    written = [path.read_text(errors="replace") for path in Path(recipe).parent.rglob("*") if path.is_file()]
    assert not [text for text in [output, *written] if SECRET in text]


def ranks_of(lab: Lab, host: str) -> list[psutil.Process]:
    space = os.readlink(f"/proc/{lab.first_process(host)}/ns/pid")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.readlink(f"/proc/{process.pid}/ns/pid") == space and "RANK" in process.environ():
                found.append(process)
    return found


def test_a_killed_rank_is_the_exit_code(lab: Lab, recipe: str) -> None:
    with in_mid_run(lab, recipe, 2) as launch:
        (rank,) = ranks_of(lab, "worker-1")
        rank.send_signal(signal.SIGKILL)
        _, errors = launch.communicate(timeout=ENDS_WITHIN_S)
        nothing_runs_on(lab, ["worker-0", "worker-1"], 10)
    assert launch.returncode == 128 + 9, errors
    named = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert named == ["error: worker-1: a rank or its launcher was ended by signal SIGKILL"]


# -- the doctor ------------------------------------------------------------------------------------------------------


def doctor(lab: Lab, *arguments: str) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and lines by host."""
    done = lab.ds_train("doctor", *arguments)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout, done.stderr
    lines = done.stdout.splitlines()
    print(done.stdout)
    return done.returncode, {
        host: [line for line in lines if f"  {host}: " in line] for host in ("", *lab.hosts, "worker-3")
    }


def test_hosts_that_are_well(lab: Lab, recipe: str) -> None:
    hosts = lab.hostfile("worker-0 slots=1", "worker-1 slots=1")
    done = lab.ds_train("doctor", recipe, "--hostfile", hosts, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["ok"]
    texts = {finding["check"]: finding["text"] for finding in found["findings"]}
    assert texts["ssh"] == "2 of 2 hosts answer"
    assert "gloo takes eth0" in texts["network"]
    assert "2 ranks all-reduce 4 MiB at" in texts["collective"]
    assert texts["recipe"].startswith("2 ranks as pipe 1, data 2")


@pytest.fixture
def other_deepspeed(tmp_path: Path) -> dict[Path, Path]:
    """Metadata that claims another version of DeepSpeed, to lay over the installed one."""
    installed = (
        Path(str(distribution("deepspeed").locate_file(".")))
        / f"deepspeed-{distribution('deepspeed').version}.dist-info"
    )
    claimed = tmp_path / "METADATA"
    version = f"Version: {distribution('deepspeed').version}"
    claimed.write_text((installed / "METADATA").read_text().replace(version, "Version: 0.18.0", 1))
    return {claimed: installed / "METADATA"}


def test_the_doctor_names_each_host_that_is_unwell(lab: Lab, other_deepspeed: dict[Path, Path]) -> None:
    lab.boot("worker-1", mounts=other_deepspeed)
    lab.boot("worker-2", key="stranger.pub")
    for host in ("worker-1", "worker-2"):
        lab.wait_for_sshd(host)
    try:
        cores = os.cpu_count() or 1
        hosts = lab.hostfile("worker-0 slots=1", f"worker-1 slots={cores + 1}", "worker-2 slots=1", "worker-3 slots=1")
        code, lines = doctor(lab, "--hostfile", hosts)
        refused = lab.ds_train("launch", "ds_configs/quickstart.yaml", "--hostfile", hosts, "--ranks", "4")
    finally:
        for host in ("worker-1", "worker-2"):
            lab.boot(host)
            lab.wait_for_sshd(host)
    assert code == 1
    assert lines["worker-0"] == []
    version, slots = lines["worker-1"]
    assert version.startswith("fail")
    assert "deepspeed 0.18.0" in version
    assert f"{cores + 1} slots on {cores} cores" in slots
    (key,) = lines["worker-2"]
    assert "doesn't know this user's key. Fix: `ssh-copy-id worker-2`" in key
    (down,) = lines["worker-3"]
    assert "it is down" in down
    assert refused.returncode == 2
    named = sorted(line.split(": ")[1] for line in refused.stderr.splitlines())
    assert named == ["worker-1", "worker-2", "worker-3"], refused.stderr


def test_the_doctor_names_the_blocked_port_and_the_folder_that_is_not_shared(
    lab: Lab, recipe: str, tmp_path: Path
) -> None:
    rule = ("ipproto", "tcp", "dport", "29500", "unreachable")
    lab.on("worker-1", "ip", "rule", "add", *rule)
    (tmp_path / "runs").mkdir()
    own = tmp_path / "own"
    own.mkdir()
    lab.boot("worker-2", mounts={own: tmp_path / "runs"})
    lab.wait_for_sshd("worker-2")
    try:
        hosts = lab.hostfile(*(f"worker-{index} slots=1" for index in range(3)))
        code, lines = doctor(lab, recipe, "batch.global_samples=6", "--hostfile", hosts)
    finally:
        lab.on("worker-1", "ip", "rule", "del", *rule)
        lab.boot("worker-2")
        lab.wait_for_sshd("worker-2")
    assert code == 1
    (blocked,) = lines["worker-1"]
    assert "it doesn't reach worker-0 on port 29500" in blocked
    (unshared,) = lines["worker-2"]
    assert f"it doesn't see what worker-0 writes into {tmp_path}/runs" in unshared
