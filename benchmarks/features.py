"""What each feature pays: a step of a 34M Llama in bf16 on one CPU rank, with everything and without one at a time.

Processor seconds of the process, which other work on the machine disturbs less than the clock; peak memory of the
process. Each variant is a process of its own, in turn, several rounds. `--docs` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from against_hf_trainer import LENGTH, LLAMA_34M, MICRO, Setting, recipe_of, run_rival, write_corpus
from launching import ROOT
from tables import machine, put_into_docs, show

RIVAL = "Hugging Face Trainer with DeepSpeed"
VARIANTS: dict[str, tuple[list[str], str]] = {  # name: keys of the recipe, libraries of ds_kernels that are left out
    "everything": ([], ""),
    "attention by torch (`model.attention: sdpa`)": (["model.attention=sdpa"], ""),
    "layers as they are (`model.lean_activations: false`)": (["model.lean_activations=false"], ""),
    "freed memory back to the system (`DS_KERNELS_WITHOUT=memory`)": ([], "memory"),
    "loss and optimizer by torch (`DS_KERNELS_WITHOUT=cpu`)": ([], "cpu"),
    "layers by torch.compile (`model.compile: true`)": (["model.compile=true"], ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], options.worker[1:], options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder, write_corpus(folder), LLAMA_34M, 1, 100)
        rounds = [one_round(folder, recipe, options.steps) for _ in range(options.rounds)]
    whole = statistics.median(one["everything"]["cpu_s"] for one in rounds)
    rows = []
    for name in rounds[0]:
        seconds = sorted(one[name]["cpu_s"] for one in rounds)
        rows.append([
            name,
            f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} - {seconds[-1]:.2f})",
            f"{statistics.median(seconds) / whole:.2f}",
            f"{statistics.median(one[name]['peak_mb'] for one in rounds):,.0f}",
        ])  # fmt: skip
    headings = ("", "processor seconds a step", "of everything's", "peak MB")
    title = f"34M Llama, bf16, one rank with one thread, micro-batch {MICRO} x {LENGTH}, {options.rounds} rounds"
    show([machine(), title], headings, rows)
    if options.docs:
        put_into_docs("features", [machine(), title], headings, rows)


def one_round(folder: Path, recipe: dict[str, Any], steps: int) -> dict[str, dict[str, float]]:
    """The rival, then every variant."""
    rival = run_rival(folder, recipe | {"schedule": {"steps": steps}}, Setting(1, 1))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return {RIVAL: rival} | {name: measured(path, name, steps) for name in VARIANTS}


def measured(recipe: Path, name: str, steps: int) -> dict[str, float]:
    keys, without = VARIANTS[name]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DS_KERNELS_WITHOUT": without}
    command = [sys.executable, __file__, "--steps", str(steps), "--worker", str(recipe), *keys]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def work(recipe: str, overrides: list[str], steps: int) -> None:
    """The process of one variant."""
    from ds_train.config import load
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine import ranks
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster

    info = ranks.rank_info()
    ranks.return_freed_memory()
    ranks.meet(info)
    from ds_train.engine.build import assemble
    from ds_train.engine.loop import train_steps
    from ds_train.schedule.timeline import make_timeline

    run = load(recipe, overrides)
    plan = make_plan(run, Cluster(1, 1, "cpu"))
    prepared = prepare(run, progress=False)
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    seconds = []
    started = time.process_time()
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    for _ in islice(train_steps(run, plan, info, parts, timeline), steps):
        seconds.append(time.process_time() - started)
        started = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": statistics.median(seconds[2:]), "peak_mb": peak}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
