"""Starting a training program as ranks on this machine or on the hosts of a hostfile, and ending all of them together.

DeepSpeed's launcher starts the ranks of each host. Its front end (launcher/runner.py) is not used: it exits with 0 when
a launcher is killed by a signal, takes a misspelt hostfile for none, tries ssh on the first host only, puts the
environment on command lines that anybody can list, and leaves the other hosts running when one is lost.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from ds_train.engine.agent import GRACE_S, exit_code
from ds_train.engine.hosts import LOCALHOST, LOST, LOST_AFTER_S, module_command, ssh_problem
from ds_train.engine.stop import SIGNALS
from ds_train.errors import HUNG_CODE, STOPPED_CODE
from ds_train.plan.hostfile import Host
from ds_train.plan.topology import Device

CARRIED = (
    "WANDB_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "DS_", "GLOO_", "NCCL_", "RCCL_", "UCX_", "MV2_",
    "FI_", "OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_", "CUDA_HOME", "CUDA_DEVICE_", "CUDA_LAUNCH_", "TRITON_",
    "PYTHON", "LD_LIBRARY_PATH", "MLFLOW_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY",
    "NO_PROXY",
)  # fmt: skip
"""Beginnings of the environment variables that go to other hosts; each host keeps its own of all others."""

_CODES = {STOPPED_CODE: "told to stop; the same command goes on", HUNG_CODE: "it hung; RUN/faults says where"}
_BY_SIGNAL = 128
_CAUSE_WITHIN_S = 3.0
_FAILED_GRACE_S = 10.0
_HEARTBEAT_S = 5.0
_POLL_S = 0.1
_ONE_SIGNAL_S = 1.0
"""timeout(1), for one, sends its signal to a process and then to all of its group: to that process twice."""


@dataclass(frozen=True)
class World:
    """Where the ranks of a launch run, and where they meet: `address` and `port` of the first host.

    A world of one host named `localhost` is this machine; other hosts are reached by ssh.
    """

    hosts: tuple[Host, ...]
    address: str
    port: int
    device: Device

    @property
    def ranks(self) -> int:
        """Ranks of all hosts."""
        return sum(len(host.slots) for host in self.hosts)

    @property
    def remote(self) -> bool:
        """Whether hosts are reached by ssh."""
        return self.hosts[0].name != LOCALHOST


def launcher_command(world: World, node: int, program: Sequence[str]) -> list[str]:
    """The argv of DeepSpeed's launcher on `world.hosts[node]`; `program` is a module and its arguments."""
    slots = {host.name: list(host.slots) for host in world.hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={node}",
        f"--master_addr={world.address}", f"--master_port={world.port}",
        # Its last words are the command line; `Launch` says what ended.
        "--log_level=critical", "--no_local_rank", "--module", *program,
    ]  # fmt: skip


def carried_environment(environ: Mapping[str, str], device: Device) -> dict[str, str]:
    """What ranks on other hosts get of this environment. Secrets are in it: it is sent, never printed or written."""
    return {key: value for key, value in environ.items() if key.startswith(CARRIED)} | {"DS_ACCELERATOR": device}


@dataclass(frozen=True)
class Ended:
    """How a launch ended: its exit code, and where that isn't 0 the host that ended first and why."""

    code: int
    host: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.host}: {self.reason}"


class Launch:
    """The ranks of `program` (a module and its arguments) on the hosts of `world`, started by the constructor.

    Lines that they print go to `say` with the host's name. Without it the first host writes to this process's own
    output (its rank 0 speaks for all), and what others say is marked with their names.
    """

    def __init__(
        self,
        world: World,
        program: Sequence[str],
        environ: Mapping[str, str] | None = None,
        say: Callable[[str, str], None] | None = None,
    ) -> None:
        self.world = world
        self._say = say
        self._words: dict[str, str] = {}
        self._orders: list[float] = []
        self._threads: list[threading.Thread] = []
        environment = carried_environment(os.environ if environ is None else environ, world.device)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for node, host in enumerate(world.hosts):
            spec = {
                "command": launcher_command(world, node, program),
                "environment": environment,
                "ranks": len(host.slots),
                "remote": world.remote,
            }
            self._processes[host.name] = self._start(host.name, first=node == 0, spec=spec)

    def _start(self, host: str, first: bool, spec: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        output, errors = (None, None) if first and self._say is None else (subprocess.PIPE, subprocess.STDOUT)
        process = subprocess.Popen(
            module_command(host, "ds_train.engine.agent"),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # Ctrl-C comes to this process alone, which ends the ranks in order
        )
        assert process.stdin is not None
        threads = [threading.Thread(target=self._speak, args=(process, process.stdin, spec), daemon=True)]
        if process.stdout is not None:
            threads.append(threading.Thread(target=self._echo, args=(host, process.stdout), daemon=True))
            self._threads.append(threads[-1])
        for thread in threads:
            thread.start()
        return process

    def _speak(self, process: subprocess.Popen[bytes], pipe: IO[bytes], spec: Mapping[str, Any]) -> None:
        """The one writer to a host: what to run, then orders as they come and a line now and then."""
        sent, spoken = 0, time.monotonic()
        lines = [json.dumps(spec)]
        with contextlib.suppress(OSError):  # it has ended, which `wait` sees
            while process.poll() is None:
                for line in lines:
                    pipe.write(line.encode() + b"\n")
                pipe.flush()
                time.sleep(_POLL_S)
                orders = self._orders[sent:]
                sent += len(orders)
                lines = [f"stop {grace_s}" for grace_s in orders]
                if time.monotonic() - spoken > _HEARTBEAT_S:
                    spoken = time.monotonic()
                    lines.append("")

    def _echo(self, host: str, pipe: IO[bytes]) -> None:
        for line in pipe:
            text = line.decode(errors="replace").rstrip()
            self._words[host] = text
            if self._say is not None:
                self._say(host, text)
            else:
                print(f"{host}: {text}", file=sys.stderr, flush=True)

    def wait(self) -> Ended:
        """Until all ranks have ended. When a host fails or is lost, the others are ended."""
        ended = Ended(0)
        stop_at = math.inf
        running = dict(self._processes)
        while running:
            for host, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[host]
                code = exit_code(process.returncode) if process.returncode < 0 else process.returncode
                killed = code > _BY_SIGNAL
                if (code and not ended.code) or (killed and ended.code <= _BY_SIGNAL and stop_at < math.inf):
                    ended = self._ending(host, code)
                    # Ranks that merely notice a killed one may end before its launcher does.
                    stop_at = time.monotonic() + (0.0 if killed else _CAUSE_WITHIN_S)
            if time.monotonic() >= stop_at:
                stop_at = math.inf
                # Ranks wait for those of a lost host until they are killed.
                self.stop(0.0 if ended.code == LOST else _FAILED_GRACE_S)
            time.sleep(_POLL_S)
        for thread in self._threads:
            thread.join(timeout=1.0)
        return ended

    def _ending(self, host: str, code: int) -> Ended:
        if code == LOST:
            known = ssh_problem(host, self._words.get(host, ""))
            reason = known.reason if known else f"the connection is lost, or it was silent for {LOST_AFTER_S} s"
            return Ended(code, host, f"{reason}; the launch ends on all hosts")
        if code > _BY_SIGNAL:
            number = code - _BY_SIGNAL
            name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
            return Ended(code, host, f"a rank or its launcher was ended by signal {name}")
        meaning = f" ({_CODES[code]})" if code in _CODES else ""
        return Ended(code, host, f"a rank ended with exit code {code}{meaning}")

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Ask all ranks to end (SIGTERM), and kill those that are there after `grace_s` seconds. Returns at once."""
        self._orders.append(grace_s)


def run(world: World, program: Sequence[str], grace_s: float = GRACE_S) -> Ended:
    """Launch `program`, wait for its end, and pass a signal of this process on to the ranks, which may save in
    `grace_s`. A second one kills them.
    """
    launch = Launch(world, program)
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        launch.stop(grace_s if len(received) == 1 else 0.0)

    with handled(end):
        ended = launch.wait()
    if received and ended.code not in (0, STOPPED_CODE):
        return Ended(128 + received[0], "launch", f"ended by {signal.Signals(received[0]).name}")
    return ended


@contextlib.contextmanager
def handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handler` hear the signals that ask a run to stop; of those that come at once the first."""
    heard = -math.inf

    def hear(number: int, frame: object) -> None:
        nonlocal heard
        if time.monotonic() - heard > _ONE_SIGNAL_S:
            heard = time.monotonic()
            handler(number, frame)

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
