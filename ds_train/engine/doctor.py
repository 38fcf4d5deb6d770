"""`ds-train doctor`: would a launch on these hosts work? Every host is asked at once, and each finding is a line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_train.config import RunConfig
from ds_train.engine import collective
from ds_train.engine.findings import Finding, clocks, interfaces, kernels, together
from ds_train.engine.hosts import ask, ask_facts, module_command
from ds_train.engine.launch import Launch, World
from ds_train.engine.session import placed
from ds_train.engine.survey import Survey, checkpoint_bytes, needs, survey
from ds_train.errors import UserError
from ds_train.plan.hostfile import Host
from ds_train.plan.make import RunPlan

_BUILD_TIMEOUT_S = 600.0
_MEET_TIMEOUT_S = 60.0


def examine(
    hosts: Sequence[Host],
    run: RunConfig | None = None,
    recipe: str = "",
    address: str | None = None,
    port: int | None = None,
) -> Iterator[Finding]:
    """Findings, as they are made: the hosts themselves, the recipe on them, what they see of each other, a collective.

    What can't be tried because of an earlier failure is left out, with a note.
    """
    surveyed = survey(hosts, port, run, recipe)
    planned, parameters = _plan(surveyed, run)
    failed = False
    for part in (
        lambda: surveyed.findings(checkpoint_bytes(parameters)),
        lambda: clocks(surveyed.answers, surveyed.facts),
        lambda: planned,
        lambda: _kernels(surveyed),
        lambda: _meeting(surveyed, address, needs(run)["folders"]),
    ):
        for finding in part():
            failed |= finding.level == "fail"
            yield finding
    if failed:
        yield Finding("note", "collective", "tried when nothing else fails")
    else:
        yield _collective(surveyed.world(address))


def _plan(surveyed: Survey, run: RunConfig | None) -> tuple[list[Finding], int | None]:
    """What the recipe's plan on these hosts says, and its parameters."""
    if not surveyed.facts:
        return [], None
    try:
        cluster = surveyed.cluster()
        if run is None:
            return [], None
        before, after = placed(run, cluster)
    except UserError as error:
        return [
            Finding("fail", "recipe", problem.reason, problem.head, problem.fix) for problem in error.problems
        ], None
    found = _planned(before.plan)
    if after is not before:
        found += _planned(after.plan, "from the cut on ")
    return found, before.plan.parameters


def _planned(plan: RunPlan, when: str = "") -> list[Finding]:
    degrees = ", ".join(f"{name} {getattr(plan.layout, name)}" for name in ("pipe", "data", "sequence", "tensor"))
    layout = Finding("ok", "recipe", f"{when}{plan.layout.ranks} ranks as {degrees}, ZeRO-{plan.zero_stage}")
    return [layout, *(Finding("note", "recipe", f"{when}{note}") for note in plan.notes)]


def _kernels(surveyed: Survey) -> list[Finding]:
    """Build the kernels of every host that answered, all at once."""
    answers = ask(dict.fromkeys(surveyed.facts, ""), "ds_kernels", (), _BUILD_TIMEOUT_S)
    found = [
        Finding("fail", "kernels", answer.problem.reason, name, "run `python -m ds_kernels` there")
        for name, answer in answers.items()
        if answer.problem is not None
    ]
    built = {name: answer.output for name, answer in answers.items() if answer.problem is None}
    return [*found, *kernels(built)]


def _meeting(surveyed: Survey, address: str | None, folders: Sequence[str]) -> list[Finding]:
    """Listen on the first host and let all others connect, and look for what it writes."""
    if len(surveyed.facts) < len(surveyed.hosts):
        return [Finding("note", "network", "ports and folders are tried when every host answers")]
    try:
        world = surveyed.world(address)
    except UserError as error:
        return [Finding("fail", "network", problem.reason, fix=problem.fix) for problem in error.problems]
    if not world.remote:
        return []
    first = world.hosts[0].name
    request = {"port": world.port, "folders": folders, "mark": uuid.uuid4().hex}
    with _listening(first, request) as ready:
        if not ready:
            text = f"it can't listen on port {world.port}"
            return [Finding("fail", "port", text, first, "give a free one with --master-port")]
        question = json.dumps({"address": world.address, "port": world.port, "marks": ready["marks"]})
        requests = {host.name: question for host in world.hosts}
        answers, met = ask_facts(requests, "ds_train.engine.probe", ["meet"], _MEET_TIMEOUT_S)
    found = [
        Finding("fail", "ssh", answer.problem.reason, name, answer.problem.fix)
        for name, answer in answers.items()
        if answer.problem is not None
    ]
    leads = {name: each["interface"] for name, each in met.items()}
    return [*found, *together(first, world.port, met), *interfaces(surveyed.facts, leads, os.environ)]


@contextlib.contextmanager
def _listening(host: str, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The listener's first words, while it listens; empty where it can't."""
    process = subprocess.Popen(
        module_command(host, "ds_train.engine.probe", ["listen"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    watch = threading.Timer(2 * _MEET_TIMEOUT_S, process.kill)
    watch.start()
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        # What a shell's start-up files print comes first.
        yield next((json.loads(line) for line in process.stdout if line.startswith("{")), {})
    except BrokenPipeError:
        yield {}
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        watch.cancel()
        process.stdout.close()


def _collective(world: World) -> Finding:
    """A real all-reduce of all ranks."""
    lines: list[str] = []
    launch = Launch(world, ["ds_train.engine.collective"], say=lambda host, line: lines.append(f"{host}: {line}"))
    timer = threading.Timer(collective.TIMEOUT_S + 30, launch.stop, (0.0,))
    timer.start()
    ended = launch.wait()
    timer.cancel()
    result = next((line.partition(collective.RESULT)[2] for line in lines if collective.RESULT in line), None)
    fix = "see that hosts reach one another on all ports, and which interface GLOO_SOCKET_IFNAME names"
    if ended.code or result is None:
        words = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else str(ended))
        return Finding("fail", "collective", f"{world.ranks} ranks can't talk to one another: {words}", fix=fix)
    record = json.loads(result)
    if not record["right"]:
        return Finding("fail", "collective", f"{world.ranks} ranks all-reduce to a wrong sum", fix=fix)
    size, rate, latency = record["bytes"] / 2**20, record["bytes_per_second"] / 1e9, record["latency_s"] * 1e6
    if world.ranks == 1:
        return Finding("ok", "collective", "one rank starts and ends")
    text = f"{world.ranks} ranks all-reduce {size:.0f} MiB at {rate:.2f} GB/s, 1 KiB in {latency:,.0f} us"
    return Finding("ok", "collective", text)
