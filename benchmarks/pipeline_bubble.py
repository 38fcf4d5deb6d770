"""The idle share of a pipeline, measured in the running engine, against (p - 1) / (m + p - 1).

p stages, m micro-batches a step. A rank is busy while it computes a forward or a backward pass; what is left of the
time from the first rank's start to the last rank's last backward pass is idle: waiting and sending. The formula takes
equal stages and messages that cost nothing (arXiv 1811.06965). `python benchmarks/pipeline_bubble.py [--stages 2]`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from launching import ROOT

sys.path.append(str(ROOT / "tests"))

MICRO_BATCHES = (1, 2, 4, 8, 16)
WARM_UP, STEPS = 2, 5
LAYERS_OF_A_STAGE = 2


def recipe(folder: Path, stages: int, micro_batches: int) -> Path:
    """A Llama whose stages cost the same: a small vocabulary, so that the head is nothing beside the layers."""
    layers = stages * LAYERS_OF_A_STAGE
    text = {
        "name": f"m{micro_batches}",
        "run_root": str(folder / "runs"),
        "model": {
            "arch": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers,
            "num_attention_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": False,
        },
        "data": {
            "source": "stdlib", "sequence_length": 256, "cache_dir": str(folder / "cache"), "validation_fraction": 0.0
        },
        "batch": {"global_samples": micro_batches, "micro_samples": 1},
        "parallel": {"pipeline": stages, "stage_layers": [LAYERS_OF_A_STAGE] * stages},
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": WARM_UP + STEPS},
    }  # fmt: skip
    path = folder / f"{text['name']}.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def worker(recipes: list[str]) -> int:
    """Train each recipe on this rank; rank 0 prints its idle share."""
    import torch.distributed as dist
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from ds_train.config import load
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine import ranks
    from ds_train.engine.build import assemble
    from ds_train.engine.loop import train_steps
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster
    from ds_train.schedule.timeline import make_timeline

    passes: list[tuple[float, float]] = []

    def timed(run: Any) -> Any:
        def wrapper(self: Any, buffer_id: int) -> None:
            started = time.perf_counter()
            run(self, buffer_id)
            passes.append((started, time.perf_counter()))

        return wrapper

    for kind in (schedule.ForwardPass, schedule.BackwardPass):
        PipelineEngine._INSTRUCTION_MAP[kind] = timed(PipelineEngine._INSTRUCTION_MAP[kind])

    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        for path in recipes:
            run = load(path)
            plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
            prepared = ranks.on_main_first(info, lambda run=run: prepare(run, progress=False))
            parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
            shares = []
            for result in train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch)):
                busy = sum(stop - start for start, stop in passes)
                everyone: list[Any] = [None] * info.ranks
                dist.all_gather_object(everyone, (passes[0][0], passes[-1][1], busy))
                passes.clear()
                window = max(stop for _, stop, _ in everyone) - min(start for start, _, _ in everyone)
                if result.step > WARM_UP:
                    shares.append(1 - sum(busy for *_, busy in everyone) / (info.ranks * window))
            if info.is_main:
                print(f"IDLE {plan.batch.accumulation} {sorted(shares)[len(shares) // 2]}", flush=True)

    return ranks.run_to_exit_code(body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=2)
    stages = parser.parse_args().stages
    cores = len(os.sched_getaffinity(0))
    if stages > cores:
        print(f"{stages} stages need {stages} cores to wait for each other's passes alone; this machine has {cores}")
        return 2
    from ranks import run_ranks

    with tempfile.TemporaryDirectory() as name:
        recipes = [str(recipe(Path(name), stages, count)) for count in MICRO_BATCHES]
        ended = run_ranks(stages, [str(Path(__file__)), "--worker", *recipes], timeout_s=1200).check()
    print("| stages | micro-batches | idle, measured | (p - 1) / (m + p - 1) |\n|---|---|---|---|")
    for line in ended.outputs[0].splitlines():
        if line.startswith("IDLE "):
            _, count, share = line.split()
            print(f"| {stages} | {count} | {float(share):.3f} | {(stages - 1) / (int(count) + stages - 1):.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
