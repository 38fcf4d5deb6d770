"""What the doctor says of facts: each way a host can be wrong is one line that names it and a fix."""

from __future__ import annotations

import copy
import socket
from dataclasses import replace
from typing import Any

import pytest

from ds_train.engine import hosts
from ds_train.engine.findings import Finding, clocks, findings, interfaces, kernels, together, unreachable
from ds_train.engine.hosts import LOCALHOST, Answer
from ds_train.engine.probe import look
from ds_train.engine.survey import Survey, refuse, survey
from ds_train.errors import Problem, UserError
from ds_train.plan.hostfile import Host

HOSTS = [Host("a", (0, 1)), Host("b", (0, 1)), Host("c", (0, 1))]


def facts(**changed: Any) -> dict[str, Any]:
    return {
        "time": 100.0, "name": "x", "python": "3.11.7", "project": "aaaa", "device": "cuda", "devices": 2, "cores": 8,
        "libraries": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}, "addresses": ["10.0.0.1"],
        "port": 29500, "files": {"r.yaml": "d1"}, "missing": [], "interfaces": ["eth0", "lo"], "nccl": "ib0",
        "folders": {"runs": {"place": "/w", "writable": True, "free": 2**40}},
    } | changed  # fmt: skip


def examined(*hosts: dict[str, Any], here: dict[str, Any] | None = None, size: int | None = None) -> list[Finding]:
    names = [host.name for host in HOSTS]
    return findings(HOSTS, dict(zip(names, hosts, strict=False)), here or facts(), 29500, size)


def wrong(found: list[Finding]) -> list[str]:
    return [str(finding) for finding in found if finding.level != "ok"]


def test_hosts_that_are_alike_are_fine() -> None:
    assert wrong(examined(facts(), facts(), facts())) == []


def test_the_probe_gives_these_facts() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        request = {"port": port, "device": "cpu", "folders": ["runs"], "files": ["r.yaml"], "paths": ["/no/such"]}
        seen = look(request)
    assert seen.keys() == facts().keys()
    assert seen["missing"] == ["/no/such"]
    assert seen["port"] != port
    assert seen["files"] == {"r.yaml": None}
    assert seen["folders"]["runs"].keys() == facts()["folders"]["runs"].keys()


def changed(path: list[str], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(facts())
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "level", "says"),
    [
        (["libraries", "torch"], "2.12.0", "fail", "b: it has torch 2.12.0, and others have 2.13.0. Fix: pip"),
        (["libraries", "deepspeed"], None, "fail", "b: it has deepspeed none, and others have 0.19.8"),
        (["python"], "3.12.1", "fail", "b: it has Python 3.12.1, and others have 3.11.7"),
        (["project"], "bbbb", "fail", "b: it has code bbbb of ds_train, and others have aaaa"),
        (["device"], "cpu", "fail", "b: it has cpu as its device, and others have cuda"),
        (["files", "r.yaml"], None, "fail", "b: it has none as digest of r.yaml"),
        (["missing"], ["/models/llama"], "fail", "b: it has no /models/llama"),
        (["devices"], 1, "fail", "b: it has 1 devices, so no slot 1. Fix: write slots=1"),
        (["folders", "runs", "writable"], False, "fail", "b: /w can't be written (runs)"),
    ],
)  # fmt: skip
def test_the_host_that_differs_is_named(path: list[str], value: Any, level: str, says: str) -> None:
    (line,) = wrong(examined(facts(), changed(path, value), facts()))
    assert line.startswith(level)
    assert says in line


def test_of_two_hosts_the_one_that_differs_from_here_is_named() -> None:
    (line,) = wrong(examined(changed(["python"], "3.12.1"), facts()))
    assert "a: it has Python 3.12.1" in line


def test_a_login_machine_of_another_version_is_a_warning() -> None:
    (line,) = wrong(examined(facts(), facts(), here=changed(["libraries", "torch"], "2.9")))
    assert line.startswith("warn")
    assert "this machine has torch 2.9, and the hosts have 2.13.0" in line


def test_cores_are_the_slots_of_a_cpu_host() -> None:
    lines = wrong(examined(*[facts(device="cpu", devices=None, cores=cores) for cores in (2, 1, 8)]))
    assert len(lines) == 1
    assert "b: 2 slots on 1 cores" in lines[0]


def test_a_checkpoint_has_to_fit_and_a_taken_port_is_told() -> None:
    (line,) = wrong(examined(facts(), facts(), size=2**41))
    assert "a: 1,024.0 GiB are free for runs, and a checkpoint takes 2,048.0 GiB" in line
    (line,) = wrong(examined(changed(["folders", "runs", "free"], 2**29), facts()))
    assert "a: only 0.5 GiB are free for runs" in line
    (line,) = wrong(examined(facts(port=31000), facts(port=29500)))
    assert line.startswith("note")
    assert "a: port 29500 is taken; 31000 is free" in line


def test_clocks_are_off_only_for_certain() -> None:
    answers = {name: Answer(name, "", None, asked=90.0, answered=110.0) for name in "abc"}
    times = {"a": facts(time=91.0), "b": facts(time=125.0), "c": facts(time=88.5)}
    assert [finding.host for finding in clocks(answers, times)] == ["b", "c"]


def test_hosts_that_do_not_answer_are_named_and_the_others_counted() -> None:
    answers = {"a": Answer("a", "", None, 0, 0), "b": Answer("b", "", Problem("b", "it is down", "start it"), 0, 0)}
    down, rest = unreachable(answers)
    assert str(down) == "fail  ssh         b: it is down. Fix: start it."
    assert rest.text == "1 of 2 hosts answer"


def test_what_hosts_see_of_the_first() -> None:
    fine = {"blocked": None, "unseen": [], "interface": "eth0"}
    assert wrong(together("a", 29500, {"a": fine, "b": fine})) == []
    bad = together("a", 29500, {"a": fine, "b": {**fine, "blocked": "timed out"}, "c": {**fine, "unseen": ["runs"]}})
    assert [(finding.host, finding.check) for finding in bad] == [("b", "port"), ("c", "shared")]
    (line,) = map(str, interfaces({"a": facts(), "b": facts()}, {"a": "eth0", "b": "eth0"}, {}))
    assert line == "ok    network     gloo takes eth0, NCCL ib0 on a, b"
    (line,) = map(str, interfaces({"a": facts()}, {"a": "eth0"}, {"GLOO_SOCKET_IFNAME": "eth1"}))
    assert line.startswith("fail  network     a: GLOO_SOCKET_IFNAME=eth1, and it has no eth1. Fix: it has eth0, lo")


def test_kernels_are_those_of_the_device() -> None:
    cpu, gpu = "cpu-avx512 (the widest)\n", "hello\ncpu-avx2 (the widest)\ncuda-sm_90 (built for it)\n/x/y.so\n"
    assert [str(found) for found in kernels({"a": gpu, "b": gpu})] == ["ok    kernels     cuda-sm_90, built on 2 hosts"]
    (line,) = map(str, kernels({"a": cpu, "b": gpu}))
    assert line == "note  kernels     hosts differ, and a step is the slowest's: a cpu-avx512, b cuda-sm_90"
    line, _ = map(str, kernels({"a": cpu, "b": f"{cpu}torch-fused (there is no nvcc here)"}))
    assert line.startswith("warn  kernels     b: torch's optimizers run there: torch-fused (there is no nvcc")


def test_a_shell_that_greets_is_told_apart_from_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"a": 'welcome\n{"x": 1}\n', "b": "welcome\n"}
    answers = {name: Answer(name, output, None, 0, 0) for name, output in said.items()}
    monkeypatch.setattr(hosts, "ask", lambda *_: answers)
    everyone, facts = hosts.ask_facts({}, "m", (), 1.0)
    assert facts == {"a": {"x": 1}}
    assert "it answered 'welcome'. Fix: see what `ssh b true` prints" in str(everyone["b"].problem)


def surveyed(**changed: Any) -> Survey:
    hosts = tuple(HOSTS[:2])
    return Survey(hosts, {}, {"a": facts(**changed), "b": facts()}, facts(), 29500)


def test_ranks_meet_at_the_address_that_ssh_reaches_the_first_host_by() -> None:
    world = surveyed(addresses=["10.0.0.7", "172.17.0.1"], port=31000).world()
    assert (world.address, world.port, world.device, world.ranks) == ("10.0.0.7", 31000, "cuda", 4)
    assert surveyed().world("head").address == "head"
    with pytest.raises(UserError, match="a has no address that others could reach"):
        surveyed(addresses=[]).world()


def test_the_planner_gets_hosts_that_are_alike() -> None:
    cluster = surveyed().cluster()
    assert (cluster.ranks, cluster.ranks_per_host, cluster.device, cluster.here) == (4, 2, "cuda", False)
    uneven = replace(surveyed(), hosts=(Host("a", (0,)), Host("b", (0, 1))))
    with pytest.raises(UserError, match=r"a has 1, b has 2\. Fix: give each host as many slots, or leave some out"):
        uneven.cluster()


def test_this_machine_needs_no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = survey([Host(LOCALHOST, (0,))])
    assert wrong(found.findings()) == []
    world = found.world()
    assert (world.address, world.device, world.remote) == ("127.0.0.1", "cpu", False)
    assert found.cluster().here
    refuse(found.findings())
    with pytest.raises(UserError, match=r"a: it is off\. Fix: switch it on"):
        refuse([Finding("warn", "x", "y"), Finding("fail", "ssh", "it is off", "a", "switch it on")])
