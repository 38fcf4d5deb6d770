"""Prints what each rank holds after a step, for several recipes: `held.py RECIPE [RECIPE ...]`."""

from __future__ import annotations

import json
import sys
from typing import Any

from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import ranks
from ds_train.engine.build import assemble
from ds_train.engine.loop import train_steps
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
from ds_train.schedule.timeline import make_timeline


def tensors(value: Any) -> list[Any]:
    """Every tensor with more than one element in nested dictionaries and lists."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if hasattr(value, "numel") and value.numel() > 1 else []
    return own + [tensor for item in inner for tensor in tensors(item)]


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        from deepspeed.accelerator import get_accelerator

        # As on a processor without fp16, where DeepSpeed's zero.Init takes another dtype than it is given.
        get_accelerator().is_fp16_supported = lambda: False
        for recipe in sys.argv[1:]:
            run = load(recipe)
            plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
            prepared = ranks.on_main_first(info, lambda run=run: prepare(run, progress=False))
            parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
            next(train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch)))
            optimizer = parts.engine.optimizer
            masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
            if masters is None:
                masters = optimizer.fp32_partitioned_groups_flat
            parameters = list(parts.model.parameters())
            states = tensors(list(optimizer.optimizer.state.values())) + tensors(list(masters))
            held = {
                "recipe": run.name,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "parameter_bytes": sum(
                    getattr(parameter, "ds_tensor", parameter).numel() * parameter.element_size()
                    for parameter in parameters
                ),
                "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in states),
            }
            print("HELD " + json.dumps(held), flush=True)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
