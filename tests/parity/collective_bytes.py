"""Prints the bytes that each rank hands to each kind of collective in a step, for several recipes:
`collective_bytes.py RECIPE [RECIPE ...]`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist

from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import ranks
from ds_train.engine.build import assemble
from ds_train.engine.loop import train_steps
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
from ds_train.schedule.timeline import make_timeline

WHOLE = {  # of each function, the argument that has the message whole, and its name among kinds
    "all_reduce": (0, "all_reduce"),
    "reduce": (0, "reduce"),
    "broadcast": (0, "broadcast"),
    "all_gather": (0, "all_gather"),
    "all_gather_into_tensor": (0, "all_gather"),
    "reduce_scatter": (1, "reduce_scatter"),
    "reduce_scatter_tensor": (1, "reduce_scatter"),
    "all_to_all_single": (1, "all_to_all"),
    "send": (0, "send"),
    "isend": (0, "send"),
}
NUMBERS = 256
"""Bytes up to which a message is a few numbers, such as a norm, and none of a model's."""

counted: Counter[str] = Counter()


def size_of(message: Any) -> int:
    """Bytes of a tensor, or of several."""
    if isinstance(message, list | tuple):
        return sum(map(size_of, message))
    return message.numel() * message.element_size()


def counting(function: Callable[..., Any], place: int, kind: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        message = arguments[place] if place < len(arguments) else next(iter(named.values()))
        groups = [value for value in (*arguments, *named.values()) if isinstance(value, dist.ProcessGroup)]
        alone = dist.get_world_size(groups[0] if groups else None) == 1
        if size_of(message) > NUMBERS and not alone:
            counted[kind] += size_of(message)
        return function(*arguments, **named)

    return call


def main() -> int:
    # Before DeepSpeed chooses among them.
    for name, (place, kind) in WHOLE.items():
        setattr(dist, name, counting(getattr(dist, name), place, kind))

    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        for recipe in sys.argv[1:]:
            run = load(recipe)
            plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
            prepared = ranks.on_main_first(info, lambda run=run: prepare(run, progress=False))
            parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
            steps = train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch))
            volumes = []
            for _ in range(3):
                counted.clear()
                next(steps)
                volumes.append(dict(counted))
            print("BYTES " + json.dumps({"recipe": run.name, "steps": volumes}), flush=True)
            parts.engine.destroy()

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
