"""The hostfile: a line per host, `name slots=N`, and which of its slots a launch takes.

As strict as the format, where DeepSpeed's own parser is not: it takes a file that isn't there for a launch on this
machine, `slots=8x` for 8, and what an exclusion leaves empty for a list with a first host (launcher/runner.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_train.errors import Problem, UserError, user_error

_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
# A name goes to ssh as it is: one that begins with `-` would be an option.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FORM = "a line is a host's name and its devices: `worker-1 slots=8`"
_FILTER_FORM = "write hosts between @, their slots behind a colon: worker-0@worker-1:0,2"
_MOST_SLOTS = 4096


@dataclass(frozen=True)
class Host:
    """A host of a launch, and the slots (device numbers, from 0) of it that get a rank each, in rising order."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """(host, slots) of each line, in their order. `#` begins a comment; empty lines are passed over.

    Raises:
        UserError: with every line that is wrong; a file that can't be read or names no host.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise user_error("hostfile", f"it can't be read: {error}", "give a text file of hosts", str(path)) from error
    hosts: dict[str, int] = {}
    seen: dict[str, int] = {}
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        parsed = _parsed(text, f"{path}:{number}")
        if isinstance(parsed, Problem):
            problems.append(parsed)
            continue
        host, slots = parsed
        if host in seen:
            reason = f"this host is on line {seen[host]} already"
            problems.append(Problem(f"{path}:{number}", reason, "write each host once, with all its slots", host))
            continue
        seen[host] = number
        hosts[host] = slots
    if problems:
        raise UserError(problems)
    if not hosts:
        raise user_error("hostfile", "it names no host", _FORM, str(path))
    return list(hosts.items())


def _parsed(text: str, place: str) -> tuple[str, int] | Problem:
    written = _LINE.fullmatch(text)
    if written is None:
        without_slots = _NAME.fullmatch(text) is not None
        return Problem(place, "this host has no slots" if without_slots else "this isn't a host", _FORM, text)
    host, slots = written.groups()
    if not _NAME.fullmatch(host):
        reason = "a host's name has letters, digits, dots, dashes and underscores only"
        return Problem(
            place, reason, "write each host on a line of its own; a user's name belongs in ~/.ssh/config", host
        )
    if not (slots.isascii() and slots.isdigit() and 0 < int(slots) <= _MOST_SLOTS):
        return Problem(place, f"slots is a whole number from 1 to {_MOST_SLOTS}", _FORM, text)
    return host, int(slots)


def select(hosts: Sequence[tuple[str, int]], include: str = "", exclude: str = "") -> list[Host]:
    """The hosts and slots that a launch takes of `hosts`, (name, slots) each, in their order.

    `include` and `exclude` are in the syntax of DeepSpeed's launcher: `worker-0@worker-1:0,2` is all of worker-0 and
    two slots of worker-1; one of the two at most.

    Raises:
        UserError: unknown hosts or slots, both filters at once, or nothing left.
    """
    if include and exclude:
        raise user_error("--exclude", "--include says already what is taken", "give one of them", exclude)
    every = {name: tuple(range(slots)) for name, slots in hosts}
    if include:
        named = _named(include, every, "--include")
        return [Host(name, named[name]) for name in every if name in named]
    named = _named(exclude, every, "--exclude") if exclude else {}
    kept = {name: tuple(slot for slot in slots if slot not in named.get(name, ())) for name, slots in every.items()}
    left = [Host(name, slots) for name, slots in kept.items() if slots]
    if not left:
        raise user_error("--exclude", "it leaves no host", "exclude less", exclude)
    return left


def _named(text: str, every: dict[str, tuple[int, ...]], key: str) -> dict[str, tuple[int, ...]]:
    """Slots of each host that a filter names."""
    found: dict[str, set[int]] = {}
    whole: dict[str, bool] = {}
    problems: list[Problem] = []
    for part in text.split("@"):
        name, colon, written = part.partition(":")
        slots = [slot.strip() for slot in written.split(",")] if colon else []
        if name not in every:
            reason = "the hostfile has no such host" if name else "a host's name is missing"
            problems.append(Problem(key, reason, f"one of {_some(list(every))}" if name else _FILTER_FORM, part))
        elif not all(slot.isascii() and slot.isdigit() for slot in slots):
            problems.append(Problem(key, "slots are whole numbers between commas", _FILTER_FORM, part))
        elif unknown := [slot for slot in slots if int(slot) not in every[name]]:
            reason = f"{name} has no slot {', '.join(unknown)}"
            problems.append(Problem(key, reason, f"its slots are 0 to {len(every[name]) - 1}", part))
        elif whole.setdefault(name, not colon) != (not colon):
            problems.append(Problem(key, f"{name} is there whole and by slots", "write it once", part))
        else:
            found.setdefault(name, set()).update(map(int, slots) if colon else every[name])
    if problems:
        raise UserError(problems)
    return {name: tuple(sorted(slots)) for name, slots in found.items()}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} ... ({len(names)} hosts)"
