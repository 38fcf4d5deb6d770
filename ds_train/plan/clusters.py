"""Clusters as people write them: 16x8:H100, a hostfile, or nothing for the machine at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ds_train.config.load import nearest
from ds_train.errors import user_error
from ds_train.plan.hardware import TABLE
from ds_train.plan.hostfile import read_hostfile
from ds_train.plan.topology import Cluster, Device, device_here

_WRITTEN = re.compile(r"(?:(\d+)x)?(\d+)(?::([\w-]+))?")
_EXAMPLE = "write hosts x devices:kind, such as 16x8:H100"


def cluster_of(text: str) -> Cluster:
    """The cluster that `text` names: `16x8:H100`, `8:A100`, `4x2:CPU`, or the path of a hostfile.

    Raises:
        UserError: it is neither.
    """
    if Path(text).expanduser().is_file():
        return cluster_of_hosts(read_hostfile(Path(text).expanduser()))
    written = _WRITTEN.fullmatch(text)
    if written is None:
        raise user_error("--cluster", "neither a cluster nor a file that is here", _EXAMPLE, text)
    hosts, devices, kind = int(written[1] or 1), int(written[2]), written[3]
    if not hosts or not devices:
        raise user_error("--cluster", "a cluster has at least one rank", _EXAMPLE, text)
    if kind is None:
        return Cluster(hosts * devices, devices, device_here(), here=False)
    known = next((name for name in TABLE if name.lower() == kind.lower()), None)
    if known is not None:
        return Cluster(hosts * devices, devices, TABLE[known].device, here=False, kind=known)
    if kind in get_args(Device):
        raise user_error("--cluster", "that is a kind of driver, not a device", f"one of {', '.join(TABLE)}", text)
    guess = nearest(kind.upper(), list(TABLE))
    fix = f"did you mean {guess}?" if guess else f"one of {', '.join(TABLE)}"
    raise user_error("--cluster", f"no figures are known of {kind}", fix, text)


def cluster_of_hosts(hosts: Sequence[tuple[str, int]], kind: str | None = None) -> Cluster:
    """The cluster of (host, slots) pairs.

    Raises:
        UserError: hosts differ in their slots, which one layout can't use evenly.
    """
    slots = sorted({count for _, count in hosts})
    if len(slots) != 1:
        found = ", ".join(f"{host} has {count}" for host, count in hosts)
        fix = "give each host as many slots, or leave some out (`ds-train launch` has --include)"
        raise user_error("hostfile", f"hosts differ in their slots: {found}", fix)
    device = TABLE[kind].device if kind is not None else device_here()
    return Cluster(len(hosts) * slots[0], slots[0], device, here=False, kind=kind)
