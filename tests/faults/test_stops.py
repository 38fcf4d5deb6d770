"""Runs that are told to stop: all ranks save after the same step, by whatever way the word comes, and go on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from place import Place, act
from ranks import ROOT, clean_environment, stop

from ds_train.engine.port import free_port

pytestmark = pytest.mark.parity

BIN = Path(sys.executable).parent
MANY = 600


def test_a_signal_to_one_rank_saves_and_stops_all(place: Place) -> None:
    place.train(place.recipe("whole", 12, {"zero_stage": 2})).check()
    recipe = place.recipe("stopped", 12, {"zero_stage": 2}, checkpoint={"every_steps": None})
    for rank, name, call in ((1, "SIGUSR1", 3), (0, "SIGTERM", 2), (1, "SIGINT", 2)):
        ended = place.train(recipe, acts=[act(rank, "ds_train.engine.loop:update", name, call=call)])
        assert ended.codes == [75, 75], ended.outputs
    assert [line["step"] for line in place.records("stopped", "stop")] == [3, 5, 7]
    assert [line["reason"] for line in place.records("stopped", "stop")] == [None, "SIGTERM", None]
    assert place.steps("stopped") == [3, 5, 7]
    place.train(recipe).check()
    assert place.history("stopped") == place.history("whole")


@pytest.mark.faults
def test_a_save_that_outlasts_the_grace_time_is_left(place: Place) -> None:
    recipe = place.recipe("slow", 12, {"zero_stage": 2}, faults={"grace_seconds": 2})
    slow = act(1, "ds_train.checkpoint.native:write_fragments", "hang", call=2)
    told = act(0, "ds_train.engine.loop:update", "SIGTERM", call=3)
    ended = place.train(recipe, acts=[told, slow], settle_s=5)
    assert ended.codes[0] == 75
    assert "SIGTERM was 2 s ago" in ended.outputs[0]
    assert place.steps("slow") == [2]
    place.train(recipe).check()


PRUNE = {"compress": {"prune": {"ffn": 0.5, "score_steps": 6}}}


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("lr-find", "the test has found nothing yet"),
        pytest.param("prune", "nothing has been cut or written", marks=pytest.mark.faults),
    ],
)
def test_commands_that_train_on_ranks_stop_in_order(place: Place, command: str, word: str) -> None:
    recipe = place.recipe("told", 20, {"zero_stage": 2}, **(PRUNE if command == "prune" else {}))
    ended = place.train(recipe, acts=[act(1, "ds_train.engine.loop:update", "SIGTERM", call=3)], command=command)
    assert ended.codes == [75, 75], ended.outputs
    assert f"told to stop (another rank was): {word}" in ended.outputs[0]
    assert "Traceback" not in "".join(ended.outputs)
    assert list(place.run("told").iterdir()) == [], "nothing is left"


class Run:
    """A run through a launcher, until it has trained a few steps."""

    def __init__(self, place: Place, command: list[str], recipe: Path) -> None:
        self.place, self.name = place, recipe.stem
        self.log = place.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(recipe)], cwd=ROOT, env=clean_environment(), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.tree = psutil.Process(self.process.pid)

    def wait_for_steps(self, steps: int = 5) -> None:
        deadline = time.monotonic() + 180
        while not (
            (self.place.run(self.name) / "metrics.jsonl").is_file() and len(self.place.history(self.name)) > steps
        ):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        self.everything = self.tree.children(recursive=True)

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes of this run with `word` on their command lines."""
        return [child for child in [self.tree, *self.tree.children(recursive=True)] if word in child.cmdline()]

    @property
    def ranks(self) -> list[psutil.Process]:
        launchers = self.processes("deepspeed.launcher.launch")
        return [child for launcher in launchers for child in launcher.children()]

    def end(self) -> str:
        """Wait until all of it has ended: the exit code is the process's."""
        self.process.wait(120)
        _, alive = psutil.wait_procs(self.everything, timeout=60)
        assert not alive, "processes are left"
        return self.log.read_text()


def deepspeed(place: Place) -> list[str]:
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    return [*launcher, "launch/train.py"]


WAYS = {
    "SIGTERM to DeepSpeed's launch.py": (1, lambda run: run.processes("deepspeed.launcher.launch")[0].terminate()),
    "SIGTERM to the deepspeed command": (-15, lambda run: run.process.terminate()),
    "Ctrl-C": (None, lambda run: os.killpg(run.process.pid, signal.SIGINT)),
    "SIGUSR1 to a rank": (75, lambda run: run.ranks[1].send_signal(signal.SIGUSR1)),
    "SIGKILL to DeepSpeed's launch.py": (None, lambda run: run.processes("deepspeed.launcher.launch")[0].kill()),
}


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
def test_through_deepspeeds_launcher(place: Place, way: str) -> None:
    code, tell = WAYS[way]
    check_stopped(place, Run(place, deepspeed(place), place.recipe("run", MANY, {"zero_stage": 2})), tell, code)


LAUNCH_WAYS = {
    "SIGTERM": lambda run: run.process.terminate(),
    "Ctrl-C": lambda run: run.process.send_signal(signal.SIGINT),
    "Slurm's SIGUSR1 to every process": lambda run: [
        process.send_signal(signal.SIGUSR1) for process in [run.tree, *run.tree.children(recursive=True)]
    ],
}


@pytest.mark.faults
@pytest.mark.parametrize("command", ["launch", "supervise"])
@pytest.mark.parametrize("way", LAUNCH_WAYS)
def test_through_our_launcher(place: Place, way: str, command: str) -> None:
    recipe = place.recipe("run", MANY, {"zero_stage": 2})
    check_stopped(place, Run(place, [str(BIN / "ds-train"), command, "--ranks", "2"], recipe), LAUNCH_WAYS[way], 75)


def check_stopped(place: Place, run: Run, tell: object, code: int | None) -> None:
    """Tell the run to stop; it saves its last step, leaves nothing running, and goes on from there."""
    try:
        run.wait_for_steps()
        assert callable(tell)
        tell(run)
        words = run.end()
        assert code is None or run.process.returncode == code, words[-3000:]
        last = place.records("run", "train")[-1]["step"]
        assert last < MANY
        assert place.steps("run")[-1] == last, words[-3000:]
        assert "Traceback" not in words.replace("KeyboardInterrupt", "") or run.process.returncode in (1, -2)
    finally:
        stop([run.process])


@pytest.mark.faults
def test_a_killed_rank_is_supervised_to_the_end(place: Place) -> None:
    place.train(place.recipe("whole", 60, {"zero_stage": 2})).check()
    recipe = place.recipe("run", 60, {"zero_stage": 2})
    run = Run(place, [str(BIN / "ds-train"), "supervise", "--ranks", "2", "--pause", "1"], recipe)
    try:
        run.wait_for_steps()
        run.ranks[1].kill()
        run.process.wait(200)
        assert run.process.returncode == 0, run.log.read_text()[-3000:]
        (restart,) = place.records("run", "restart")
        assert restart["exit_code"] == 128 + 9
        assert restart["ranks"] == 2
        assert place.history("run") == place.history("whole")
    finally:
        stop([run.process])


@pytest.mark.faults
def test_what_the_user_must_mend_is_not_started_again(place: Place) -> None:
    recipe = place.recipe("run", 6, {"zero_stage": 2}, checkpoint={"resume": str(place.folder / "nowhere")})
    run = Run(place, [str(BIN / "ds-train"), "supervise", "--ranks", "2"], recipe)
    run.process.wait(120)
    assert run.process.returncode == 2
    assert run.log.read_text().count("error: checkpoint.resume=") == 1
