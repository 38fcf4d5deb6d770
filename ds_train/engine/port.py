"""`python -m ds_train.engine.port` prints a free TCP port, for the launcher's --master_port."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    print(free_port())
