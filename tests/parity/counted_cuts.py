"""Trains recipes as train_many.py does, and prints what each cut leaves: `counted_cuts.py RECIPE [RECIPE ...]`."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import psutil
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.distributed import distributed_c10d

from ds_train.config import load
from ds_train.engine import job, ranks
from ds_train.engine.session import Session

_plain_cut = Session._cut


def counts() -> dict[str, int]:
    """Engines, process groups, threads and open files of this process."""
    gc.collect()
    process = psutil.Process()
    return {
        "engines": sum(isinstance(one, DeepSpeedEngine) for one in gc.get_objects()),
        "groups": len(distributed_c10d._world.pg_map),
        "threads": process.num_threads(),
        "files": process.num_fds(),
    }


def _cut(session: Any, step: int) -> None:
    before = counts()
    _plain_cut(session, step)
    print("CUT " + json.dumps({"name": session.run.name, "before": before, "after": counts()}), flush=True)


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        Session._cut = _cut  # type: ignore[method-assign]
        for recipe in sys.argv[1:]:
            job.train(load(recipe), info)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
