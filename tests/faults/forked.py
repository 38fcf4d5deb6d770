"""Launches of a zygote (tests/faults/zygote.py), with what strikes their ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import ROOT, Ended, clean_environment

from ds_train.engine.port import free_port

Act = dict[str, Any]


def act(rank: int, at: str, do: str = "SIGKILL", when: str = "before", call: int = 1, delay: float = 0.0) -> Act:
    """What strikes `rank` before, during (`delay` seconds later) or after call number `call` of the function `at`: a
    signal, `hang`, or `spoil` a weight of what the function gave."""
    return {"rank": rank, "at": at, "do": do, "when": when, "call": call, "delay": delay}


@dataclass
class Launch:
    """Ranks that have been started and not waited for."""

    zygote: subprocess.Popen[str]
    logs: Path
    pids: list[int] = field(default_factory=list)

    def wait(self) -> Ended:
        """How they ended."""
        assert self.zygote.stdout is not None
        codes = json.loads(self.zygote.stdout.readline())
        outputs = [(self.logs / f"rank{rank}.log").read_text(errors="replace") for rank in range(len(codes))]
        return Ended(codes, outputs)


class Zygote:
    """A process that starts ranks by forking itself."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._count = logs, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment(),
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(
        self, recipe: Path, *overrides: str, acts: Sequence[Act] = (), ranks: int = 2, timeout_s: float = 300,
        settle_s: float = 20, ordinary: bool = False, own_overrides: dict[int, list[str]] | None = None,
    ) -> Launch:  # fmt: skip
        """Start ranks that train `recipe`; after one has ended badly, the others get `settle_s`.

        Args:
            ordinary: they ask for the modes of files, as root doesn't.
            own_overrides: overrides of single ranks.
        """
        self._count += 1
        logs = self._logs / f"launch{self._count:03d}"
        launch = {
            "ranks": ranks, "recipe": str(recipe), "overrides": overrides, "acts": list(acts), "logs": str(logs),
            "timeout_s": timeout_s, "settle_s": settle_s, "ordinary": ordinary, "port": free_port(),
            "own_overrides": own_overrides or {},
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(launch) + "\n")
        self._process.stdin.flush()
        return Launch(self._process, logs, json.loads(self._process.stdout.readline()))

    def run(self, recipe: Path, *overrides: str, **launch: Any) -> Ended:
        """Start ranks and wait for them."""
        return self.start(recipe, *overrides, **launch).wait()

    def close(self) -> None:
        """End it; ranks that are left end with their launch's time-out."""
        self._process.kill()
        self._process.wait()
