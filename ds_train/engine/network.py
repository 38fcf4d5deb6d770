"""Addresses, ports and interfaces of this host, without sending anything."""

from __future__ import annotations

import os
import socket

import psutil

_FAR = "198.51.100.1"  # a documentation address (RFC 5737): nobody's, so that the default route leads to it


def is_free(port: int) -> bool:
    """Whether nobody on this host listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def addresses() -> list[str]:
    """IPv4 addresses of this host by which others may reach it, that of the ssh connection first."""
    asked = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    own = [each.address for found in psutil.net_if_addrs().values() for each in found if each.family == socket.AF_INET]
    return [each for each in dict.fromkeys(asked + own) if not each.startswith("127.") and each != "::1"]


def interface_to(address: str) -> str | None:
    """Name of the interface of this host that leads to `address`, a host of the launch; None where nothing does.

    Gloo by itself takes the one that the host's own name stands for (torch's ProcessGroupGloo.cpp), which many
    distributions make the loopback. Where `address` is such a name, of this host, its way out is the answer.
    """
    own = _source(address)
    if own is not None and (own.startswith("127.") or own == "::1"):
        own = _source(_FAR) or next(iter(addresses()), None)
    names = {each.address.partition("%")[0]: name for name, found in psutil.net_if_addrs().items() for each in found}
    return names.get(own) if own is not None else None


def _source(address: str) -> str | None:
    """The address of this host that packets to `address` come from."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def nccl_interface() -> str | None:
    """What NCCL would take for its sockets: InfiniBand first, then what isn't docker's or the loopback."""
    up = psutil.net_if_stats()
    ranked = [
        (not name.startswith("ib"), name.startswith("docker"), name.startswith("lo"), place, name)
        for place, (name, found) in enumerate(psutil.net_if_addrs().items())
        if up[name].isup and any(each.family in (socket.AF_INET, socket.AF_INET6) for each in found)
    ]
    return min(ranked)[-1] if ranked else None
