"""Prints the losses of repeated parts of a range test, for several recipes: `range_losses.py RECIPE [RECIPE ...]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_train.config import load
from ds_train.engine import lr_find, ranks
from ds_train.engine.stop import StopRequest
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        for recipe in sys.argv[1:]:
            run = load(recipe)
            plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
            parts: list[list[float]] = []

            def search(train: Any, *_: Any, parts: list[list[float]] = parts) -> None:
                parts += [list(train([rate] * steps)) for rate, steps in ((3e-3, 4), (0.3, 7), (3e-3, 4))]
                next(train([3e-3] * 4))  # left early

            lr_find.find_learning_rate = search  # type: ignore[assignment]
            folder = Path(run.run_root) / run.name
            folder.mkdir(parents=True, exist_ok=True)
            lr_find._search(run, plan, info, lr_find.RangeTest(), folder, StopRequest(grace_s=60))
            ranks.barrier()
            left = sorted(path.name for path in folder.iterdir())
            print("LOSSES " + json.dumps({"name": run.name, "parts": parts, "left": left}), flush=True)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
