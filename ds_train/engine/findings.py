"""What is wrong with the hosts of a launch: pure functions of the facts that probe.py found on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from ds_train.engine.hosts import LOCALHOST, Answer
from ds_train.errors import Problem
from ds_train.plan.hostfile import Host

Facts = Mapping[str, Any]
Level = Literal["ok", "note", "warn", "fail"]

_CLOCK_S = 1.0
_LITTLE_BYTES = 2**30
_CHOICE = re.compile(r"[\w.-]+ \(.*\)")  # ds_kernels' `Choice` as text


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. A launch would fail with a `fail`, and be worse than it could be with a `warn`."""

    level: Level
    check: str
    text: str
    host: str = ""
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        end = "" if self.fix.endswith(("?", ".")) else "."
        fix = f". Fix: {self.fix}{end}" if self.fix else ""
        return f"{self.level:4}  {self.check:10}  {where}{self.text}{fix}"

    def problem(self) -> Problem:
        """This finding as what a launch is refused for."""
        return Problem(self.host or self.check, self.text, self.fix)


def unreachable(answers: Mapping[str, Answer]) -> list[Finding]:
    """A failure for every host that didn't answer, and a line for those that did."""
    found = [
        Finding("fail", "ssh", problem.reason, host, problem.fix)
        for host, answer in answers.items()
        if (problem := answer.problem) is not None
    ]
    reached = len(answers) - len(found)
    if reached and LOCALHOST not in answers:
        found.append(Finding("ok", "ssh", f"{reached} of {len(answers)} hosts answer"))
    return found


def findings(
    hosts: Sequence[Host],
    facts: Mapping[str, Facts],
    here: Facts,
    wanted_port: int,
    checkpoint_bytes: int | None = None,
) -> list[Finding]:
    """All that the hosts which answered tell: `facts` are theirs by name, `here` this machine's.

    `checkpoint_bytes` is what one checkpoint takes, where it is known.
    """
    found = [*_alike(facts, here), *_slots(hosts, facts), *_folders(facts, checkpoint_bytes)]
    for name, each in facts.items():
        for path in each["missing"]:
            found.append(Finding("fail", "files", f"it has no {path}", name, "copy it there, or share its folder"))
    first = next((host.name for host in hosts if host.name in facts), None)
    if first is not None and facts[first]["port"] != wanted_port:
        text = f"port {wanted_port} is taken; {facts[first]['port']} is free and will be used"
        found.append(Finding("note", "port", text, first))
    return found


def _alike(facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Differences in what has to be the same: versions, code, kind of device, recipe."""
    yield from _one_value("python", facts, here, ["python"], "Python {}", "install Python {}")
    for name in here["libraries"]:
        fix = f"pip install {name}=={{}}"
        yield from _one_value("versions", facts, here, ["libraries", name], f"{name} {{}}", fix)
    yield from _one_value("project", facts, here, ["project"], "code {} of ds_train", "bring all to one commit")
    fix = "set DS_ACCELERATOR, or use hosts of one kind"
    yield from _one_value("device", facts, None, ["device"], "{} as its device", fix)
    for path in here["files"]:
        fix = f"copy {path} to every host, or share its folder"
        yield from _one_value("files", facts, here, ["files", path], f"{{}} as digest of {path}", fix)
    if facts:
        one = next(iter(facts.values()))
        libraries = ", ".join(f"{name} {version}" for name, version in one["libraries"].items())
        yield Finding("ok", "versions", f"Python {one['python']}, {libraries} on {next(iter(facts))}")


def _one_value(
    check: str, facts: Mapping[str, Facts], here: Facts | None, keys: Sequence[str], what: str, fix: str
) -> Iterator[Finding]:
    """A failure for each host whose value isn't most hosts', or a warning where only this machine differs from all."""

    def value(each: Facts) -> Any:
        return reduce(lambda found, key: found[key], keys, each)

    counts = Counter(value(each) for each in facts.values())
    if not counts:
        return
    own = value(here) if here is not None else None
    # Of equally many the value of this machine, which plans the launch.
    usual = max(counts, key=lambda found: (counts[found], found == own))
    for host, each in facts.items():
        if value(each) != usual:
            text = f"it has {what.format(_shown(value(each)))}, and others have {_shown(usual)}"
            yield Finding("fail", check, text, host, fix.format(_shown(usual)))
    if here is not None and own != usual:
        text = f"this machine has {what.format(_shown(own))}, and the hosts have {_shown(usual)}"
        yield Finding("warn", check, text, fix=fix.format(_shown(usual)))


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _slots(hosts: Sequence[Host], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    for host in hosts:
        each = facts.get(host.name)
        if each is None:
            continue
        devices, highest = each["devices"], max(host.slots)
        if each["device"] == "cuda" and devices is not None and highest >= devices:
            missing = ", ".join(str(slot) for slot in host.slots if slot >= devices)
            text = f"it has {devices} devices, so no slot {missing}"
            yield Finding("fail", "slots", text, host.name, f"write slots={devices} in the hostfile")
        elif each["device"] == "cpu" and len(host.slots) > each["cores"]:
            text = f"{len(host.slots)} slots on {each['cores']} cores: its ranks wait for one another"
            yield Finding("warn", "slots", text, host.name, f"write slots={each['cores']} in the hostfile")


def _folders(facts: Mapping[str, Facts], checkpoint_bytes: int | None) -> Iterator[Finding]:
    """Rights on all hosts; room on the first, as they share their folders."""
    for place, (name, each) in enumerate(facts.items()):
        for folder, room in each["folders"].items():
            free = room["free"]
            if not room["writable"]:
                fix = "give this user the right to, or set run_root and data.cache_dir elsewhere"
                yield Finding("fail", "disk", f"{room['place']} can't be written ({folder})", name, fix)
            elif place:
                continue
            elif checkpoint_bytes is not None and free < checkpoint_bytes:
                text = f"{_gib(free)} are free for {folder}, and a checkpoint takes {_gib(checkpoint_bytes)}"
                yield Finding("fail", "disk", text, name, "free some, or set run_root elsewhere")
            elif free < _LITTLE_BYTES:
                yield Finding("warn", "disk", f"only {_gib(free)} are free for {folder}", name, "free some")


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


def clocks(answers: Mapping[str, Answer], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Hosts whose clock is off for certain: it said a time outside of question and answer."""
    for name, each in facts.items():
        answer = answers[name]
        off = max(answer.asked - each["time"], each["time"] - answer.answered)
        if off > _CLOCK_S:
            text = f"its clock is off by at least {off:,.0f} s: times in its logs and files mislead"
            yield Finding("warn", "clock", text, name, "start an NTP client there, such as chrony")


def kernels(built: Mapping[str, str]) -> list[Finding]:
    """What runs the optimizers on each host: `built` is what `python -m ds_kernels` printed there."""
    found, kinds = [], {}
    for name, output in built.items():
        # The last such line is about the device, where there is one.
        words = next((line for line in reversed(output.splitlines()) if _CHOICE.fullmatch(line)), "torch (unknown)")
        kinds[name] = words.partition(" ")[0]
        if kinds[name].startswith("torch"):
            text = f"torch's optimizers run there: {words}"
            found.append(Finding("warn", "kernels", text, name, "install g++, and nvcc for a GPU"))
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        found.append(Finding("note", "kernels", f"hosts differ, and a step is the slowest's: {each}"))
    elif kinds and not found:
        found.append(Finding("ok", "kernels", f"{next(iter(kinds.values()))}, built on {len(kinds)} hosts"))
    return found


def interfaces(
    facts: Mapping[str, Facts], leads: Mapping[str, str | None], environ: Mapping[str, str]
) -> Iterator[Finding]:
    """What gloo and NCCL take on each host: `leads` is its interface to the first one; the environment goes before."""
    told: dict[str, list[str]] = {}
    for name, each in facts.items():
        chosen = environ.get("GLOO_SOCKET_IFNAME")
        if chosen and (unknown := set(chosen.split(",")) - set(each["interfaces"])):
            text = f"GLOO_SOCKET_IFNAME={chosen}, and it has no {', '.join(sorted(unknown))}"
            fix = f"it has {', '.join(each['interfaces'])}; without the variable gloo takes {leads.get(name)}"
            yield Finding("fail", "network", text, name, fix)
            continue
        words = f"gloo takes {chosen or leads.get(name)}"
        if each["device"] == "cuda":
            words += f", NCCL {environ.get('NCCL_SOCKET_IFNAME') or each['nccl']}"
        told.setdefault(words, []).append(name)
    for words, names in told.items():
        yield Finding("ok", "network", f"{words} on {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")


def together(first: str, port: int, answers: Mapping[str, Facts]) -> list[Finding]:
    """What the hosts saw of the first one: its port, and the markers in its folders."""
    found = []
    for name, each in answers.items():
        if each["blocked"] is not None:
            text = f"it doesn't reach {first} on port {port}: {each['blocked']}"
            fix = f"open port {port} (gloo and NCCL take others too), or give --master-addr and --master-port"
            found.append(Finding("fail", "port", text, name, fix))
        for folder in each["unseen"]:
            text = f"it doesn't see what {first} writes into {folder}"
            fix = "let run_root and data.cache_dir lie in a folder that all hosts share"
            found.append(Finding("fail", "shared", text, name, fix))
    if not found:
        found.append(Finding("ok", "port", f"port {port} of {first} is open to all, and all see its folders"))
    return found
