"""What is run on a host, with which environment, and what its exit code means. Starts nothing."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ds_train.engine import launch, network
from ds_train.engine.agent import _whole_orders, exit_code, rank_environment
from ds_train.engine.hosts import LOCALHOST, LOST, explain, module_command
from ds_train.engine.launch import World, carried_environment, launcher_command
from ds_train.engine.survey import hosts_of
from ds_train.errors import UserError
from ds_train.plan.hostfile import Host

WORLD = World((Host("a", (0, 1)), Host("b", (2, 3))), "10.0.0.1", 29500, "cuda")


def test_deepspeeds_launcher_understands_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher.launch import parse_args

    program = ["ds_train.engine", "my recipe.yaml", 'model.x={"a": 1}', "--flag"]
    command = launcher_command(WORLD, 1, program)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr(sys, "argv", command[3:])
    understood = parse_args()
    assert json.loads(base64.urlsafe_b64decode(understood.world_info)) == {"a": [0, 1], "b": [2, 3]}
    assert (understood.node_rank, understood.master_addr, understood.master_port) == (1, "10.0.0.1", 29500)
    assert understood.module
    assert [understood.training_script, *understood.training_script_args] == program


def test_a_remote_shell_runs_the_same_python_in_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a b:/c")
    assert module_command(LOCALHOST, "some.module", ["x"]) == [sys.executable, "-u", "-m", "some.module", "x"]
    *ssh, host, line = module_command("b", "some.module", ["x y"])
    assert ssh[0] == "ssh"
    assert "BatchMode=yes" in ssh
    assert host == "b"
    words = shlex.split(line)
    assert words[:3] == ["cd", os.getcwd(), "&&"]
    assert words[3:] == ["exec", "env", "PYTHONPATH=/a b:/c", sys.executable, "-u", "-m", "some.module", "x y"]


def test_a_signal_that_comes_twice_at_once_is_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) sends its signal to the process, and then to the group that it is in; a second one would kill."""
    heard: list[int] = []
    with launch.handled(lambda number, _: heard.append(number)):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        monkeypatch.setattr(launch, "_ONE_SIGNAL_S", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2


def test_secrets_are_sent_and_on_no_command_line() -> None:
    secret = {"WANDB_API_KEY": "s3cret-wandb", "HF_TOKEN": "s3cret hf"}
    environ = {**secret, "NCCL_DEBUG": "INFO", "HOME": "/root", "SSH_AUTH_SOCK": "/x", "CUDA_VISIBLE_DEVICES": "1"}
    carried = carried_environment(environ, "cuda")
    assert carried == {**secret, "NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cuda"}
    lines = [*launcher_command(WORLD, 0, ["m"]), *module_command("b", "ds_train.engine.agent")]
    assert "s3cret" not in " ".join(lines)


def test_ranks_get_threads_unless_the_user_says_otherwise() -> None:
    spec = {"environment": {"A": "1"}, "ranks": 1}
    env = rank_environment({"PATH": "/bin", "A": "0"}, spec)
    assert env["A"] == "1"
    assert 1 <= int(env["OMP_NUM_THREADS"]) <= len(os.sched_getaffinity(0))
    assert env["PATH"].split(":")[-1] == "/bin"
    assert rank_environment({}, {**spec, "ranks": 10**6})["OMP_NUM_THREADS"] == "1"
    assert rank_environment({}, {**spec, "environment": {"OMP_NUM_THREADS": "3"}})["OMP_NUM_THREADS"] == "3"


def test_the_interface_to_another_host_is_not_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on the first host, whose own name may stand for 127.0.1.1."""
    own = SimpleNamespace(family=socket.AF_INET, address="10.9.8.7")
    local = SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [local], "ib1": [own]})
    monkeypatch.setattr(network, "_source", {"worker-1": "10.9.8.7", "localhost": "127.0.1.1"}.get)
    assert network.interface_to("worker-1") == "ib1"
    assert network.interface_to("localhost") == "ib1"
    assert network.interface_to("nowhere") is None
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    assert network.addresses() == ["10.0.0.1", "10.9.8.7"]


def test_exit_codes_are_the_shells() -> None:
    assert [exit_code(code) for code in (0, 1, 2, 77)] == [0, 1, 2, 77]
    assert [exit_code(code) for code in (-9, 256 - 9)] == [137, 137], "its launcher and a rank that was killed"
    assert exit_code(256 - 11) == 139
    assert exit_code(255) != LOST


@pytest.mark.parametrize(
    ("code", "words", "says"),
    [
        (255, "root@b: Permission denied (publickey).\n", "doesn't know this user's key. Fix: `ssh-copy-id b`"),
        (255, "Host key verification failed.", "b: ssh doesn't know this host's key"),
        (255, "ssh: Could not resolve hostname b: Name or service not known", "b: no machine of this name is known"),
        (255, "ssh: connect to host b port 22: No route to host", "b: it is down: no route to it"),
        (255, "ssh: connect to host b port 22: Connection timed out", "b: it is down: ssh got no answer"),
        (255, "ssh: connect to host b port 22: Connection refused", "b: nothing listens there for ssh"),
        (255, "", "b: ssh: exit code 255"),
        (1, "/usr/bin/python3: No module named ds_train", "No module named ds_train there. Fix: install this project"),
        (127, "env: no such file", f"b: it has no {sys.executable}. Fix: install this Python"),
        (1, f"sh: 1: cd: can't cd to {os.getcwd()}", f"b: it has no folder {os.getcwd()}"),
        (1, "Traceback ...\n  x\nOSError: disk full\n", "b: OSError: disk full"),
    ],
)  # fmt: skip
def test_a_host_that_fails_is_one_line_with_a_fix(code: int, words: str, says: str) -> None:
    text = str(explain("b", code, words))
    assert says in text
    assert "\n" not in text
    assert "Fix: " in text


def test_ranks_are_spread_over_hosts_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tmp_path / "hosts"
    path.write_text("a slots=4\nb slots=4\n")
    assert hosts_of(path, "", "", 4) == [Host("a", (0, 1)), Host("b", (0, 1))]
    assert hosts_of(path, "b:1,3", "", None) == [Host("b", (1, 3))]
    assert hosts_of(None, "", "", 3) == [Host(LOCALHOST, (0, 1, 2))]
    assert hosts_of(None, "", "", None) == [Host(LOCALHOST, (0,))]
    for ranks, says in ((3, "give 2 or 4"), (1, "give 2"), (10, "give at most 8")):
        with pytest.raises(UserError, match=says):
            hosts_of(path, "", "", ranks)
    path.write_text("localhost slots=2\nb slots=2\n")
    with pytest.raises(UserError, match="localhost is another machine on each host"):
        hosts_of(path, "", "", None)


def test_visible_devices_are_the_slots_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert hosts_of(None, "", "", None) == [Host(LOCALHOST, (2, 5))]
    assert hosts_of(None, "", "", 1) == [Host(LOCALHOST, (2,))]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(UserError, match="by number only"):
        hosts_of(None, "", "", None)


def test_an_order_that_the_network_cut_in_two_is_one_order() -> None:
    assert _whole_orders(b"stop 12") == ([], b"stop 12")
    assert _whole_orders(b"stop 12" + b"0.0\n\nstop 0.0\n\n") == ([120.0, 0.0], b"")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_machine_whose_devices_are_all_hidden_is_no_machine_without_slots(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=r"hides every device.*DS_ACCELERATOR=cpu"):
        hosts_of(None, "", "", None)
