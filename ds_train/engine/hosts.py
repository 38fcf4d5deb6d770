"""The hosts of a launch: how a module of this project is run on them, by ssh or here, and what each answers.

Every host has this Python, this folder and this project at the same paths, as DeepSpeed's launcher asks for too.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ds_train.errors import Problem

LOCALHOST = "localhost"
"""Name of this machine in a launch without a hostfile: it isn't reached by ssh."""

CONNECT_TIMEOUT_S = 10
LOST_AFTER_S = 15
"""How long a host may be silent before its connection counts as lost."""

LOST = 255
"""Exit code of ssh for its own errors; no rank's end is told by it."""

_SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}", "-o", "LogLevel=ERROR",
    "-o", f"ServerAliveInterval={LOST_AFTER_S // 3}", "-o", "ServerAliveCountMax=3",
    # A connection shared with the user's shell would outlive this one, or end it.
    "-o", "ControlMaster=no", "-o", "ControlPath=none",
)  # fmt: skip
_FAN_OUT = 256


def module_command(host: str, module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The argv that runs `python -m module` on `host`, in this folder; nothing secret is in it."""
    python = [sys.executable, "-u", "-m", module, *arguments]
    if host == LOCALHOST:
        return python
    path = os.environ.get("PYTHONPATH")
    variables = ["env", f"PYTHONPATH={path}"] if path else []
    return [*_SSH, host, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([*variables, *python])}"]


@dataclass(frozen=True)
class Answer:
    """What a module printed on a host, or the problem; between `asked` and `answered`, in seconds since the epoch."""

    host: str
    output: str
    problem: Problem | None
    asked: float
    answered: float


def ask(requests: Mapping[str, str], module: str, arguments: Sequence[str], timeout_s: float) -> dict[str, Answer]:
    """Run `module` on every host at once, with its request as standard input. Hosts that fail have a problem."""

    def one(host: str) -> Answer:
        asked = time.time()
        output, problem = "", None
        try:
            done = subprocess.run(
                module_command(host, module, arguments),
                input=requests[host], capture_output=True, text=True, errors="replace", timeout=timeout_s,
            )  # fmt: skip
            output = done.stdout
            if done.returncode:
                problem = explain(host, done.returncode, done.stderr)
        except subprocess.TimeoutExpired:
            problem = Problem(host, f"no answer within {timeout_s:.0f} s", _is_up(host))
        except OSError as error:
            problem = Problem(host, f"{error.filename} can't be run here", "install OpenSSH's client on this machine")
        return Answer(host, output, problem, asked, time.time())

    with ThreadPoolExecutor(max_workers=min(_FAN_OUT, max(1, len(requests)))) as pool:
        return dict(zip(requests, pool.map(one, requests), strict=True))


def ask_facts(
    requests: Mapping[str, str], module: str, arguments: Sequence[str], timeout_s: float
) -> tuple[dict[str, Answer], dict[str, dict[str, Any]]]:
    """As `ask`, of a module whose last line is JSON: all answers, and that line of hosts without a problem."""
    answers, facts = ask(requests, module, arguments, timeout_s), {}
    for host, answer in answers.items():
        if answer.problem is None:
            try:
                facts[host] = json.loads(answer.output.strip().splitlines()[-1])
            except (ValueError, IndexError):
                reason = f"it answered {answer.output.strip()[-80:]!r}"
                fix = f"see what `ssh {host} true` prints: a shell's start-up files are to print nothing then"
                answers[host] = replace(answer, problem=Problem(host, reason, fix))
    return answers, facts


def _is_up(host: str) -> str:
    return f"see that it is up and that `ssh {host} true` works, or take it out of the hostfile"


def explain(host: str, code: int, words: str) -> Problem:
    """Why a module couldn't run on `host`, from the exit code and the last words of ssh, the shell or Python."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    if code == LOST:
        return ssh_problem(host, words) or Problem(host, f"ssh: {last}", _is_up(host))
    if "No module named" in last:
        return Problem(host, f"{last} there", "install this project there, at the same path as here")
    if code in (126, 127):
        fix = "install this Python environment there at the same path, or share its folder"
        return Problem(host, f"it has no {sys.executable}", fix)
    if os.getcwd() in last:
        return Problem(
            host, f"it has no folder {os.getcwd()}", "share this folder, or start from one that all hosts have"
        )
    return Problem(host, last, _is_up(host))


def ssh_problem(host: str, words: str) -> Problem | None:
    """What ssh's own words mean; None where they are none that are known."""
    for sign, reason, fix in _SSH_ERRORS:
        if sign in words:
            return Problem(host, reason, fix.format(host=host))
    return None


_SSH_ERRORS = (
    (
        "Permission denied", "ssh is refused: it doesn't know this user's key",
        "`ssh-copy-id {host}`, or name the right key in ~/.ssh/config",
    ),
    (
        "Host key verification failed", "ssh doesn't know this host's key, or knows another",
        "`ssh {host} true` by hand shows it; a new machine of an old name needs `ssh-keygen -R {host}`",
    ),
    ("Could not resolve", "no machine of this name is known", "correct the hostfile, /etc/hosts or ~/.ssh/config"),
    ("No route to host", "it is down: no route to it", "start it, or take it out of the hostfile"),
    ("Connection timed out", "it is down: ssh got no answer", "start it, or take it out of the hostfile"),
    ("Connection refused", "nothing listens there for ssh", "start its sshd, or name its port in ~/.ssh/config"),
)  # fmt: skip
