"""Several hosts on this machine: network namespaces on a bridge, each with its own name, processes and sshd.

Nothing of it is in this machine's own network, and a host that is killed loses its processes and its link, as by a
power cut. All hosts see one file system, as by NFS, but for what `mounts` lays over it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from ranks import ROOT, clean_environment

LOGIN = "login"
_NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")
_SUBNET = "10.231.7"
_PREFIX = "dst"


def unavailable() -> str | None:
    """Why there can be no lab here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make cluster` installs them on Debian)"
    name = f"{_PREFIX}{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces aren't allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


class Lab:
    """A login machine with a bridge, and hosts `worker-0`, `worker-1` ... that `start` plugs into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}
        _remove_stale()
        self._keys()
        self._namespace(LOGIN)
        self._ip(LOGIN, "link", "add", "br0", "type", "bridge")
        self._ip(LOGIN, "addr", "add", f"{_SUBNET}.254/24", "dev", "br0")
        self._ip(LOGIN, "link", "set", "br0", "up")

    def address(self, host: str) -> str:
        """Where `host` is in the lab's network."""
        return f"{_SUBNET}.{int(host.rpartition('-')[2]) + 1}"

    def start(self, count: int) -> Lab:
        """Start worker-0 to worker-(count - 1)."""
        for index in range(count):
            self.boot(f"worker-{index}")
        for host in self.hosts:
            self.wait_for_sshd(host)
        return self

    def boot(self, host: str, key: str = "user.pub", mounts: Mapping[Path, Path] | None = None) -> None:
        """Start `host`, again where it runs; it lets the owner of `key` in. `mounts` is {what: over which path}."""
        self.kill(host)
        name = self._namespace(host)
        self._ip(LOGIN, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip(LOGIN, "link", "set", host, "master", "br0", "up")
        self._ip(host, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        for other in (LOGIN, *self.hosts):  # which may remember a former interface of this address
            self._ip(other, "neigh", "flush", "all")
        config = self.folder / f"{host}.sshd"
        config.write_text(
            f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/{key}\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin prohibit-password\nUseDNS no\nMaxStartups 100\n"
        )
        # As Debian's installer writes it: a host's own name leads to its loopback.
        hosts = self._hosts_file(host, f"127.0.1.1 {host}\n")
        binds = [
            f"mount --bind {what} {where}" for what, where in {hosts: Path("/etc/hosts"), **(mounts or {})}.items()
        ]
        script = [f"hostname {host}", *binds, "mount -t tmpfs none /run", "mkdir /run/sshd"]
        script.append(f"exec /usr/sbin/sshd -D -e -f {config}")
        with (self.folder / f"{host}.log").open("wb") as log:
            self.hosts[host] = subprocess.Popen(
                [
                    "ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
                    "--mount-proc", "sh", "-e", "-c", "\n".join(script),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, host: str) -> None:
        """A power cut: its link is down before any of its processes could say a word, and then they are gone."""
        if host in self.hosts:
            self.cut(host)
            _kill(self.hosts.pop(host))
            self._ip(LOGIN, "link", "del", host)  # the kernel's own removal comes some time after the namespace's
        self._remove(host)

    def cut(self, host: str) -> None:
        """Unplug `host` from the network; it runs on."""
        self._ip(LOGIN, "link", "set", host, "down")

    def inside(self, host: str) -> list[str]:
        """Command lines of all processes of `host` but its sshd's."""
        space = os.readlink(f"/proc/{self.first_process(host)}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(" ".join(process.cmdline()))
        return [line for line in found if "sshd" not in line and line]

    def first_process(self, host: str) -> int:
        """Process 1 of `host`, by its number here."""
        return _first_process(self.hosts[host])

    def on(self, host: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the network of `host`."""
        full = ["ip", "netns", "exec", self._name(host), *command]
        return subprocess.run(full, check=True, capture_output=True, text=True, timeout=60)

    def command(self, *command: str) -> list[str]:
        """The argv of `command` on the login machine."""
        hosts = self._hosts_file(LOGIN, "")
        script = f'mount --bind {hosts} /etc/hosts; exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self._name(LOGIN),
            "unshare",
            "--mount",
            "sh",
            "-e",
            "-c",
            script,
            "sh",
            *command,
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A login shell's: this repository, and an `ssh` that has the lab's key."""
        env = clean_environment({"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **(extra or {})})
        return {**env, "PATH": f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"}

    def run(
        self, *command: str, timeout_s: float = 400, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login machine to its end."""
        return subprocess.run(
            self.command(*command),
            env=self.environment(env),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def ds_train(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `ds-train` on the login machine to its end."""
        return self.run(sys.executable, "-m", "ds_train.cli", *arguments, env=env)

    def hostfile(self, *lines: str) -> str:
        """Path of a hostfile with these lines."""
        path = self.folder / "hostfile"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def close(self) -> None:
        """Take everything down."""
        for host in list(self.hosts):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(host)
        for name in _namespaces():
            if name.startswith(self._name("")):
                _remove_namespace(name)

    # -- how ---------------------------------------------------------------------------------------------------------

    def _name(self, host: str) -> str:
        return f"{_PREFIX}{os.getpid()}-{host}"

    def _namespace(self, host: str) -> str:
        name = self._name(host)
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        self._ip(host, "link", "set", "lo", "up")
        return name

    def _ip(self, host: str, *words: str) -> None:
        subprocess.run(["ip", "-n", self._name(host), *words], check=True, capture_output=True, timeout=60)

    def _remove(self, host: str) -> None:
        if self._name(host) in _namespaces():
            _remove_namespace(self._name(host))

    def _keys(self) -> None:
        for name in ("host", "user", "stranger"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
            subprocess.run(words, check=True, capture_output=True)
        public = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"* {public}")
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/user\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {self.folder}/known_hosts\n StrictHostKeyChecking yes\n"
        )
        (self.folder / "bin").mkdir()
        ssh = self.folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)

    def _hosts_file(self, host: str, own: str) -> Path:
        path = self.folder / f"{host}.hosts"
        others = [f"{self.address(f'worker-{index}')} worker-{index}" for index in range(4)]
        path.write_text(
            "127.0.0.1 localhost\n" + own + "\n".join(line for line in others if f" {host}" not in line) + "\n"
        )
        return path

    def wait_for_sshd(self, host: str) -> None:
        """Until `host` lets people in."""
        deadline = time.monotonic() + 30
        while "Server listening" not in (self.folder / f"{host}.log").read_text():
            assert self.hosts[host].poll() is None, (self.folder / f"{host}.log").read_text()
            assert time.monotonic() < deadline, f"{host} has no sshd after 30 s"
            time.sleep(0.05)


def _first_process(unshare: subprocess.Popen[bytes]) -> int:
    (child,) = psutil.Process(unshare.pid).children()
    return child.pid


def _kill(unshare: subprocess.Popen[bytes]) -> None:
    """With the first process of a process namespace the kernel ends all others."""
    with contextlib.suppress(psutil.Error, ValueError):
        os.kill(_first_process(unshare), signal.SIGKILL)
    unshare.wait(timeout=30)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(_PREFIX)]


def _remove_namespace(name: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _remove_stale() -> None:
    """Namespaces of test runs that were killed."""
    for name in _namespaces():
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove_namespace(name)


def tail(words: Sequence[str]) -> str:
    """The end of a command's output, for a failure."""
    return "\n".join(each[-4000:] for each in words)
