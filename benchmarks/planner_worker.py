"""One rank of benchmarks/planner.py: trains small layouts, each in a fresh process forked after the imports.

`planner_worker.py OUTPUT RECIPE=PORT [RECIPE=PORT ...]` appends a JSON line per recipe to OUTPUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

STEPS = 4
READ_AT = 2
"""Step in which the engine's tensors are read; the later ones are timed."""


def status(name: str) -> int:
    """A size of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak() -> int:
    """Most memory since the last reset that this process allocated; pages of program files aren't counted."""
    return status("VmHWM") - status("RssFile")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def storages(values: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of every storage under nested dictionaries, lists and tensors."""
    import torch

    found: dict[int, int] = {}
    for value in values:
        if isinstance(value, dict):
            found |= storages(value.values())
        elif isinstance(value, (list, tuple)):
            found |= storages(value)
        elif isinstance(value, torch.Tensor) and not value.is_meta and value.numel() > 1:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return found


def covered(values: Iterable[Any]) -> int:
    """Bytes under all tensors of nested dictionaries and lists, those of views that overlap once."""
    import torch

    spans: list[tuple[int, int]] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            spans.append((value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()))
        elif isinstance(value, (dict, list, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    for value in values:
        walk(value)
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def parameters(engine: Any, model: Any) -> dict[int, int]:
    """Storages of the weights that the model computes with, or of this rank's partitions of them."""
    found = storages(getattr(parameter, "ds_tensor", parameter.data) for parameter in model.parameters())
    names = ("bit16_groups_flat", "bf16_groups_flat", "fp16_partitioned_groups_flat")
    return found | storages(getattr(engine.optimizer, name, []) for name in names)


def gradients(engine: Any, model: Any) -> int:
    """Bytes of gradients, in whichever place DeepSpeed's optimizer of the stage keeps them."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    names = ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer",
             "accumulated_grads_in_cpu")  # fmt: skip
    found = [getattr(optimizer, name, None) for name in names]
    found += [getattr(p, name, None) for p in model.parameters() for name in ("grad", "grad_accum")]
    found += [p.grad for group in inner.param_groups for p in group["params"]]
    return covered(found + [p.grad for p in getattr(optimizer, "fp32_partitioned_groups_flat", [])])


def states(engine: Any, model: Any) -> dict[int, int]:
    """Storages of master weights and moments."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found = storages([[group["params"] for group in inner.param_groups], *inner.state.values()])
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
    found |= storages(getattr(optimizer, name, []) for name in names)
    held = parameters(engine, model)
    return {place: size for place, size in found.items() if place not in held}


def one(recipe: str) -> dict[str, Any]:
    """Train the recipe's steps on this rank: what it held, its peak, and how long its steps took."""
    from deepspeed.runtime.pipe import schedule

    from ds_train.config import load
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine import ranks
    from ds_train.engine.build import assemble
    from ds_train.engine.loop import train_steps
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster
    from ds_train.schedule.timeline import make_timeline

    info = ranks.rank_info()
    ranks.return_freed_memory()
    base = status("RssAnon")
    ranks.meet(info)
    run = load(recipe)
    plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
    prepared = ranks.on_main_first(info, lambda: prepare(run, progress=False))
    reset_peak()
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    engine, model = parts.engine, parts.model
    held = {"gradients": 0}
    reading = [False]

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            done = work(*arguments, **options)
            if reading[0]:
                held["gradients"] = max(held["gradients"], gradients(engine, model))
            return done

        return wrapper

    if plan.layout.pipe > 1:
        # The engine's own, whose instructions are timed (track/phases.py).
        instructions = engine._INSTRUCTION_MAP
        backward = watched(instructions[schedule.BackwardPass])
        engine._INSTRUCTION_MAP = {**instructions, schedule.BackwardPass: backward}
    else:
        engine.backward = watched(engine.backward)
    seconds, busy = [], []
    reading[0] = READ_AT == 1
    steps = train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch))
    started = time.process_time()
    for result in islice(steps, STEPS):
        reading[0] = result.step + 1 == READ_AT
        if result.step > READ_AT:
            seconds.append(result.seconds)
            busy.append(time.process_time() - started)
        started = time.process_time()
    held |= {
        "parameters": sum(parameters(engine, model).values()),
        "optimizer": sum(states(engine, model).values()),
        "peak": peak() - base,
    }
    predicted = plan.predicted
    assert predicted is not None
    expected = predicted.stages[plan.layout.coordinates(info.rank).pipe]
    return {
        "name": run.name, "rank": info.rank, "held": held, "seconds": min(seconds), "busy": min(busy),
        "expected": {**expected.device, "peak": expected.device_bytes},
    }  # fmt: skip


def child(recipe: str, port: str, output: str) -> None:
    """The forked process: one recipe, then its end without the interpreter's."""
    code = 1
    try:
        os.environ["MASTER_PORT"] = port
        line = one(recipe)
        with Path(f"{output}.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        import torch.distributed as dist

        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    output, *recipes = sys.argv[1:]
    import transformers

    import ds_train.engine.build
    import ds_train.engine.job
    import ds_train.engine.loop  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    for argument in recipes:
        recipe, _, port = argument.rpartition("=")
        process = os.fork()
        if process == 0:
            child(recipe, port, output)
        if os.waitpid(process, 0)[1]:
            print(f"failed: {recipe}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
