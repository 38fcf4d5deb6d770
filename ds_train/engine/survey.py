"""Which hosts and slots a launch takes, what each of them is, and where their ranks meet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_train.checkpoint.manifest import without_manifest
from ds_train.checkpoint.same_run import bad_checkpoint
from ds_train.config import RunConfig
from ds_train.data.sources import check_paths
from ds_train.engine.findings import Facts, Finding, findings, unreachable
from ds_train.engine.hosts import LOCALHOST, Answer, ask_facts
from ds_train.engine.launch import World
from ds_train.engine.port import free_port
from ds_train.engine.probe import devices, look
from ds_train.errors import Problem, UserError, user_error
from ds_train.plan.clusters import cluster_of_hosts
from ds_train.plan.hostfile import Host, read_hostfile, select
from ds_train.plan.topology import Cluster, device_here, known_device

DEFAULT_PORT = 29500
"""Where ranks of several hosts meet, as DeepSpeed's launcher has it; firewalls know it."""

_LOOK_TIMEOUT_S = 60.0
_BYTES_IN_CHECKPOINT = 12
"""A parameter in fp32 with Adam's two moments."""


def hosts_of(hostfile: Path | None, include: str, exclude: str, ranks: int | None) -> list[Host]:
    """The hosts of a hostfile, or this machine, with the slots that the filters and the number of ranks leave.

    Raises:
        UserError: the hostfile, a filter, or a number of ranks that the hosts don't have.
    """
    if hostfile is not None:
        hosts = select(read_hostfile(hostfile.expanduser()), include, exclude)
    elif include or exclude:
        hosts = select([(LOCALHOST, devices() or len(os.sched_getaffinity(0)))], include, exclude)
    else:
        hosts = [Host(LOCALHOST, _slots_here(ranks))]
    if len(hosts) > 1 and any(host.name == LOCALHOST for host in hosts):
        raise user_error(
            "hostfile", "localhost is another machine on each host", "write this machine's name", LOCALHOST
        )
    return hosts if ranks is None else _trimmed(hosts, ranks)


def _slots_here(ranks: int | None) -> tuple[int, ...]:
    """Devices of this machine; on the CPU as many as there are ranks, which is one where nobody says it."""
    if accelerator() != "cuda":
        return tuple(range(ranks or 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(range(devices() or 1))
    try:
        slots = tuple(int(part) for part in visible.split(",") if part.strip())
    except ValueError:
        reason = "DeepSpeed's launcher takes devices by number only"
        raise user_error("CUDA_VISIBLE_DEVICES", reason, "give their numbers", visible) from None
    if not slots or min(slots) < 0:
        fix = "give their numbers, or set DS_ACCELERATOR=cpu to train without any"
        raise user_error("CUDA_VISIBLE_DEVICES", "it hides every device", fix, visible)
    return slots


def _trimmed(hosts: Sequence[Host], ranks: int) -> list[Host]:
    each, rest = divmod(ranks, len(hosts))
    if rest:
        below, above = ranks - rest, ranks - rest + len(hosts)
        nearest = f"give {below} or {above}" if below else f"give {above}"
        raise user_error("--ranks", f"{len(hosts)} hosts can't have as many ranks each", nearest, ranks)
    for host in hosts:
        if len(host.slots) < each:
            reason = f"{host.name} would have {each} ranks, and it has {len(host.slots)} slots"
            raise user_error("--ranks", reason, f"give at most {len(hosts) * len(host.slots)}", ranks)
    return [Host(host.name, host.slots[:each]) for host in hosts]


def accelerator() -> str:
    """The kind of device that this machine's ranks use."""
    named = os.environ.get("DS_ACCELERATOR")
    return known_device(named, "DS_ACCELERATOR") if named else device_here()


@dataclass(frozen=True)
class Survey:
    """What the hosts of a launch answered; `facts` of those that did, by name."""

    hosts: tuple[Host, ...]
    answers: Mapping[str, Answer]
    facts: Mapping[str, Facts]
    here: Facts
    port: int
    missing: tuple[Problem, ...] = ()
    """What a run on this machine alone would not find; what other hosts have isn't seen from here."""

    def findings(self, checkpoint_bytes: int | None = None) -> list[Finding]:
        """What is wrong with them."""
        found = unreachable(self.answers)
        found += findings(self.hosts, self.facts, self.here, self.port, checkpoint_bytes)
        return [*found, *(Finding("fail", "files", each.reason, each.head, each.fix) for each in self.missing)]

    def cluster(self) -> Cluster:
        """These hosts, for the planner; the kind of device is that of the first that answered.

        Raises:
            UserError: hosts differ in their slots.
        """
        device = known_device(next(iter(self.facts.values()))["device"], "DS_ACCELERATOR")
        cluster = cluster_of_hosts([(host.name, len(host.slots)) for host in self.hosts])
        return replace(cluster, device=device, here=self.hosts[0].name == LOCALHOST)

    def world(self, address: str | None = None) -> World:
        """Where ranks run and meet. All hosts have answered.

        Raises:
            UserError: the first host has no address but the loopback's.
        """
        first = self.facts[self.hosts[0].name]
        device = known_device(first["device"], "DS_ACCELERATOR")
        if self.hosts[0].name == LOCALHOST:
            return World(self.hosts, address or "127.0.0.1", first["port"], device)
        if address is None and not first["addresses"]:
            reason = f"{self.hosts[0].name} has no address that others could reach"
            raise user_error("--master-addr", reason, "give the one that its ranks meet at")
        return World(self.hosts, address or first["addresses"][0], first["port"], device)


def survey(hosts: Sequence[Host], port: int | None = None, run: RunConfig | None = None, recipe: str = "") -> Survey:
    """Ask every host what it is, all at once; with `run`, also for what this recipe (of the file `recipe`) needs."""
    local = hosts[0].name == LOCALHOST
    wished = port or (free_port() if local else DEFAULT_PORT)  # here no firewall minds, and runs may start at once
    request = {"port": wished, "device": os.environ.get("DS_ACCELERATOR"), **needs(run, recipe)}
    here = look(request)
    if local:
        answers = {LOCALHOST: Answer(LOCALHOST, "", None, here["time"], here["time"])}
        return Survey(tuple(hosts), answers, {LOCALHOST: here}, here, wished, tuple(missing(run)) if run else ())
    requests = {host.name: json.dumps(request) for host in hosts}
    answers, facts = ask_facts(requests, "ds_train.engine.probe", ["look"], _LOOK_TIMEOUT_S)
    return Survey(tuple(hosts), answers, facts, here, wished)


def needs(run: RunConfig | None, recipe: str = "") -> dict[str, list[str]]:
    """Folders that a run writes to, files that are to be the same on all hosts, and paths that each has to have."""
    if run is None:
        return {"folders": ["runs"], "files": [], "paths": []}
    models = (run.model.path, run.compress.distill.teacher)
    return {
        "folders": [run.run_root, run.data.cache_dir],
        "files": [recipe] if recipe else [],
        "paths": [model for model in models if model is not None and Path(model).is_dir()],
    }


def missing(run: RunConfig) -> list[Problem]:
    """What a run reads and this machine hasn't, besides what its plan looks at (model, tokenizer, teacher)."""
    problems = check_paths(run.data)
    resume = run.checkpoint.resume
    reason = None if resume in ("auto", "never") else without_manifest(Path(resume).expanduser())
    return [*problems, bad_checkpoint(resume, reason)] if reason is not None else problems


def checkpoint_bytes(parameters: int | None) -> int | None:
    """What a checkpoint of so many parameters takes on disk, about."""
    return None if parameters is None else parameters * _BYTES_IN_CHECKPOINT


def refuse(found: Sequence[Finding], plan: Callable[[], object] = lambda: None) -> None:
    """Raise the failures among `found`, and what is wrong with a plan, as one `UserError`, if there are any."""
    failed = [finding.problem() for finding in found if finding.level == "fail"]
    try:
        plan()
    except UserError as error:
        failed = [*error.problems, *failed]
    if failed:
        raise UserError(failed)


def describe(world: World) -> str:
    """A launch in a line."""
    where = "this machine" if not world.remote else f"{len(world.hosts)} hosts"
    count = f"{world.ranks} rank{'s' if world.ranks > 1 else ''}"
    return f"{count} on {where} ({world.device}), which meet at {world.address}:{world.port}"
