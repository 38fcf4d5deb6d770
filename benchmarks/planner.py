"""Predicted against measured on CPU ranks: bytes that each rank holds, its peak, and the time of a step.

Small layouts of two models are trained, each in fresh processes; what the engine holds is read from its tensors, the
peak from the kernel. Predictions come from the recipe and from figures that `ds-train calibrate` measures first.
Constants of plan/memory.py that describe the C library's heap are fitted to the Llama's layouts, not to GPT-2's.

`python benchmarks/planner.py [--only NAME ...] [--rounds 2]`; with `--store FOLDER` what was measured is kept, so that
layouts and rounds can be measured in parts, and `--rounds 0` prints it with predictions of the code as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from launching import ROOT

sys.path.append(str(ROOT / "tests"))

LLAMA = {
    "arch": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"arch": "gpt2", "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 256, "vocab_size": 8192}
BF16 = {"precision": {"dtype": "bf16"}}
CHECKPOINTING = {"model": {"activation_checkpointing": True}}
OFFLOAD = {"offload_optimizer": "cpu"}

# Ranks, `parallel` section, other sections.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "zero0": (2, {"zero_stage": 0}, {}),
    "zero1": (2, {"zero_stage": 1}, {}),
    "zero2": (2, {"zero_stage": 2}, {}),
    "zero3": (2, {"zero_stage": 3}, {}),
    "zero1-bf16": (2, {"zero_stage": 1}, BF16),
    "zero2-bf16": (2, {"zero_stage": 2}, BF16),
    "zero3-bf16": (2, {"zero_stage": 3}, BF16),
    "zero2-offload": (2, {"zero_stage": 2, **OFFLOAD}, {}),
    "zero3-offload-bf16": (2, {"zero_stage": 3, "offload_params": "cpu", **OFFLOAD}, BF16),
    "zero2-checkpointing": (2, {"zero_stage": 2}, CHECKPOINTING),
    "pipe2": (2, {"pipeline": 2}, {}),
    "tensor2": (2, {"tensor": 2, "zero_stage": 1}, {}),
    "sequence2-zero2": (2, {"sequence": 2, "zero_stage": 2}, {}),
    "alone": (1, {"zero_stage": 0}, {}),
    "alone-zero1-bf16": (1, {"zero_stage": 1}, BF16),
    "zero2-4": (4, {"zero_stage": 2}, {}),
    "tensor2-zero3-4": (4, {"tensor": 2, "zero_stage": 3}, {}),
    "pipe2-tensor2-4": (4, {"pipeline": 2, "tensor": 2}, {}),
    "pipe2-data2-bf16-4": (4, {"pipeline": 2}, BF16),
}
# Sequence ranks exchange around attention without dropout; GPT-2 keeps its own dropout everywhere else.
MODELS = {"llama": (LLAMA, set()), "gpt2": (GPT2, {"sequence2-zero2", "zero3-bf16", "pipe2-data2-bf16-4", "alone"})}
HELD = ("parameters", "gradients", "optimizer", "peak")
EXACT, ROUGH = 0.01, 0.20


def recipe(folder: Path, cache: Path, model: str, layout: str, samples: int = 16) -> Path:
    """A recipe of one layout: `samples` of 256 tokens a step, micro-batches of 2."""
    _, parallel, sections = LAYOUTS[layout]
    text: dict[str, Any] = {
        "name": f"{model}-{layout}",
        "run_root": str(folder / "runs"),
        "model": MODELS[model][0],
        "data": {"source": "stdlib", "sequence_length": 256, "cache_dir": str(cache), "validation_fraction": 0.0},
        "batch": {"global_samples": samples, "micro_samples": 2},
        "parallel": parallel,
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": 8},
    }
    for name, section in sections.items():
        text[name] = text.get(name, {}) | section
    path = folder / f"{text['name']}.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def measure(names: list[tuple[str, str]], rounds: int, folder: Path, samples: int) -> None:
    """Append a line per (layout, rank, round) to `folder`/rows.jsonl; layouts take turns in each round."""
    from ranks import run_ranks

    from ds_train.engine.port import free_port

    script, output = ROOT / "benchmarks" / "planner_worker.py", folder / f"measured-{os.getpid()}"
    for _ in range(rounds):
        for ranks in sorted({LAYOUTS[layout][0] for _, layout in names}):
            together = [name for name in names if LAYOUTS[name[1]][0] == ranks]
            paths = [recipe(folder, folder / "cache", *name, samples) for name in together]
            arguments = [f"{path}={free_port()}" for path in paths]
            try:
                run_ranks(ranks, [str(script), str(output), *arguments], timeout_s=240 * len(paths) + 60).check()
            finally:
                with (folder / "rows.jsonl").open("a") as rows:
                    for part in folder.glob(f"{output.name}.*"):
                        rows.write(part.read_text())
                        part.unlink()


def rows(names: list[tuple[str, str]], folder: Path, samples: int) -> list[dict[str, Any]]:
    """What was measured, a row per (layout, rank), with what is predicted; times are the least of the rounds.

    `seconds` is a step's time, `busy` the processor time of the busiest rank: on a machine with other work the first
    is anything, the second hardly more than it would be alone.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        before = found.get((row["name"], row["rank"]), row)
        least = {key: min(row.get(key, math.inf), before.get(key, math.inf)) for key in ("seconds", "busy")}
        found[row["name"], row["rank"]] = row | least
    measured = {name for name, _ in found}
    wanted = [name for name in names if "-".join(name) in measured]
    predicted = {"-".join(name): predict(folder, *name, samples) for name in wanted}
    for name in predicted:  # a step is as long as its busiest rank needs
        ranks = [row for (other, _), row in found.items() if other == name]
        for row in ranks:
            row["busy"] = max(other["busy"] for other in ranks)
    order = list(predicted)
    known = sorted((key for key in found if key[0] in predicted), key=lambda key: (order.index(key[0]), key[1]))
    return [found[name, rank] | predicted[name][rank] for name, rank in known]


def predict(folder: Path, model: str, layout: str, samples: int) -> list[dict[str, Any]]:
    """Of each rank the bytes by item, the seconds of a step, and those without waiting for other pipeline stages."""
    from ds_train.config import load
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster

    ranks = LAYOUTS[layout][0]
    path = recipe(folder, folder / "cache", model, layout, samples)
    plan = make_plan(load(path), Cluster(ranks, ranks, "cpu"))
    assert plan.predicted is not None
    assert plan.predicted.step is not None
    stages = [plan.predicted.stages[plan.layout.coordinates(rank).pipe] for rank in range(ranks)]
    step = plan.predicted.step
    cores = min(1.0, len(os.sched_getaffinity(0)) / ranks)  # what a rank has of one
    times = {"expected_seconds": step.seconds, "expected_busy": (step.seconds - step.pipeline) * cores}
    return [{"expected": {**stage.device, "peak": stage.device_bytes}} | times for stage in stages]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: the correlation of the ranks of two lists without ties."""

    def places(values: list[float]) -> list[int]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(place) for place in range(len(values))]

    count = len(first)
    square = sum((a - b) ** 2 for a, b in zip(places(first), places(second), strict=True))
    return 1 - 6 * square / (count * (count**2 - 1))


def report(found: list[dict[str, Any]], times_alone: bool) -> bool:
    """Print what ranks hold and how long steps take; whether everything is within its bound."""
    good = times_alone or report_memory(found)
    return report_times(found) and good


def report_memory(found: list[dict[str, Any]]) -> bool:
    """Print a row per layout, of the rank whose peak is predicted worst; whether all ranks are within the bounds."""
    mib = 2**20
    worst: dict[str, float] = dict.fromkeys(HELD, 0.0)
    shown: dict[str, dict[str, Any]] = {}
    for row in found:
        row["off"] = {name: row["expected"].get(name, 0) / row["held"][name] - 1 for name in HELD}
        for name, error in row["off"].items():
            worst[name] = max(worst[name], abs(error))
        if abs(row["off"]["peak"]) >= abs(shown.get(row["name"], row)["off"]["peak"]):
            shown[row["name"]] = row
    print("| layout | parameters | gradients | optimizer | peak: predicted | measured | off by |")
    print("|---" * 7 + "|")
    for name, row in shown.items():
        cells = " | ".join(f"{row['held'][item] / mib:.1f} ({row['off'][item]:+.1%})" for item in HELD[:3])
        peaks = f"{row['expected']['peak'] / mib:.0f} | {row['held']['peak'] / mib:.0f} | {row['off']['peak']:+.0%}"
        print(f"| {name} | {cells} | {peaks} |")
    print(
        f"\nMiB. Largest errors over all ranks: {', '.join(f'{name} {error:.1%}' for name, error in worst.items())}.\n"
    )
    return all(worst[name] <= EXACT for name in HELD[:3]) and worst["peak"] <= ROUGH


def report_times(found: list[dict[str, Any]]) -> bool:
    """Print a row per layout; whether the order of the processor times is as predicted."""
    print("| layout | step: predicted | measured | without waiting: predicted | processor time |")
    print("|---" * 5 + "|")
    rows = [row for row in found if row["rank"] == 0]
    for row in rows:
        times = (f"{row[key]:.2f} s" for key in ("expected_seconds", "seconds", "expected_busy", "busy"))
        print(f"| {row['name']} | {' | '.join(times)} |")
    if len(rows) < 3:
        return True
    of_steps, of_processors = (
        rank_correlation([row[f"expected_{key}"] for row in rows], [row[key] for row in rows])
        for key in ("seconds", "busy")
    )
    print(f"\nRank correlation of {len(rows)}: {of_steps:.2f} of the steps, {of_processors:.2f} of processor times.")
    return of_processors >= 0.8 or len(rows) < 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="layouts, as MODEL-LAYOUT; all without it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="samples of a step")
    parser.add_argument(
        "--times", action="store_true", help="print no memory, which is of steps of several micro-batches"
    )
    parser.add_argument("--store", type=Path, help="folder of what was measured; it is added to")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the ranks end too
    names = [
        (model, layout)
        for model, (_, without) in MODELS.items()
        for layout in LAYOUTS
        if layout not in without and (not arguments.only or f"{model}-{layout}" in arguments.only)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.store or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["DS_TRAIN_CALIBRATION"] = str(folder / "calibration.json")
        if not (folder / "calibration.json").exists():
            command = [sys.executable, "-m", "ds_train.cli", "calibrate", "--ranks", "1,2,4"]
            subprocess.run(command, check=True, cwd=ROOT)
        measure(names, arguments.rounds, folder, arguments.samples)
        return 0 if report(rows(names, folder, arguments.samples), arguments.times) else 1


if __name__ == "__main__":
    sys.exit(main())
