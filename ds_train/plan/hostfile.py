"""The hostfile: a line per host, `name slots=N`, as DeepSpeed's launcher and this planner read it.

As strict as the format: DeepSpeed takes a file that isn't there for a launch on this machine (launcher/runner.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from ds_train.errors import Problem, UserError, user_error

_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
_FORM = "a line is a host's name and its devices: `worker-1 slots=8`"


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """(host, slots) of each line, in their order. `#` begins a comment; empty lines are passed over.

    Raises:
        UserError: with every line that is wrong; a file that can't be read or names no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise user_error("hostfile", f"it can't be read: {error}", "give a text file of hosts", str(path)) from error
    hosts: dict[str, int] = {}
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        place = f"{path}:{number}"
        written = _LINE.fullmatch(text)
        if written is None:
            problems.append(Problem(place, "this isn't a host", _FORM, text))
            continue
        host, slots = written.groups()
        if not (slots.isascii() and slots.isdigit() and int(slots)):
            problems.append(Problem(place, "slots is a whole number above 0", _FORM, text))
        elif host in hosts:
            problems.append(
                Problem(place, "this host is there twice", "write each host once, with all its slots", host)
            )
        else:
            hosts[host] = int(slots)
    if problems:
        raise UserError(problems)
    if not hosts:
        raise user_error("hostfile", "it names no host", _FORM, str(path))
    return list(hosts.items())
