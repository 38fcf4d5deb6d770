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


def recipe(folder: Path, cache: Path, model: str, layout: str) -> Path:
    """A recipe of one layout: 16 samples of 256 tokens a step, micro-batches of 2."""
    _, parallel, sections = LAYOUTS[layout]
    text: dict[str, Any] = {
        "name": f"{model}-{layout}",
        "run_root": str(folder / "runs"),
        "model": MODELS[model][0],
        "data": {"source": "stdlib", "sequence_length": 256, "cache_dir": str(cache), "validation_fraction": 0.0},
        "batch": {"global_samples": 16, "micro_samples": 2},
        "parallel": parallel,
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": 8},
    }
    for name, section in sections.items():
        text[name] = text.get(name, {}) | section
    path = folder / f"{text['name']}.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def measure(names: list[tuple[str, str]], rounds: int, folder: Path) -> None:
    """Append a line per (layout, rank, round) to `folder`/rows.jsonl; layouts take turns in each round."""
    from ranks import run_ranks

    from ds_train.engine.port import free_port

    script, output = ROOT / "benchmarks" / "planner_worker.py", folder / f"measured-{os.getpid()}"
    for _ in range(rounds):
        for ranks in sorted({LAYOUTS[layout][0] for _, layout in names}):
            paths = [recipe(folder, folder / "cache", *name) for name in names if LAYOUTS[name[1]][0] == ranks]
            arguments = [f"{path}={free_port()}" for path in paths]
            try:
                run_ranks(ranks, [str(script), str(output), *arguments], timeout_s=240 * len(paths) + 60).check()
            finally:
                with (folder / "rows.jsonl").open("a") as rows:
                    for part in folder.glob(f"{output.name}.*"):
                        rows.write(part.read_text())
                        part.unlink()


def rows(names: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """What was measured, a row per (layout, rank), with what is predicted; step times are the least of the rounds."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        before = found.get((row["name"], row["rank"]), row)
        found[row["name"], row["rank"]] = row | {"seconds": min(row["seconds"], before["seconds"])}
    predicted = {f"{model}-{layout}": predict(folder, model, layout) for model, layout in names}
    order = list(predicted)
    known = sorted((key for key in found if key[0] in predicted), key=lambda key: (order.index(key[0]), key[1]))
    return [found[name, rank] | predicted[name][rank] for name, rank in known]


def predict(folder: Path, model: str, layout: str) -> list[dict[str, Any]]:
    """Of each rank the bytes by item and the seconds of a step."""
    from ds_train.config import load
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster

    ranks = LAYOUTS[layout][0]
    plan = make_plan(load(recipe(folder, folder / "cache", model, layout)), Cluster(ranks, ranks, "cpu"))
    assert plan.predicted is not None
    assert plan.predicted.step is not None
    stages = [plan.predicted.stages[plan.layout.coordinates(rank).pipe] for rank in range(ranks)]
    seconds = plan.predicted.step.seconds
    return [{"expected": {**stage.device, "peak": stage.device_bytes}, "expected_seconds": seconds} for stage in stages]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: the correlation of the ranks of two lists without ties."""

    def places(values: list[float]) -> list[int]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(place) for place in range(len(values))]

    count = len(first)
    square = sum((a - b) ** 2 for a, b in zip(places(first), places(second), strict=True))
    return 1 - 6 * square / (count * (count**2 - 1))


def report(found: list[dict[str, Any]]) -> bool:
    """Print a row per layout, of the rank whose peak is predicted worst; whether everything is within its bound."""
    mib = 2**20
    worst: dict[str, float] = dict.fromkeys(HELD, 0.0)
    shown: dict[str, dict[str, Any]] = {}
    for row in found:
        row["off"] = {name: row["expected"].get(name, 0) / row["held"][name] - 1 for name in HELD}
        for name, error in row["off"].items():
            worst[name] = max(worst[name], abs(error))
        if abs(row["off"]["peak"]) >= abs(shown.get(row["name"], row)["off"]["peak"]):
            shown[row["name"]] = row
    columns = "parameters | gradients | optimizer | peak: predicted | measured | off by | step: predicted | measured"
    print(f"| layout | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in shown.items():
        cells = " | ".join(f"{row['held'][item] / mib:.1f} ({row['off'][item]:+.1%})" for item in HELD[:3])
        peaks = f"{row['expected']['peak'] / mib:.0f} | {row['held']['peak'] / mib:.0f} | {row['off']['peak']:+.0%}"
        print(f"| {name} | {cells} | {peaks} | {row['expected_seconds']:.2f} s | {row['seconds']:.2f} s |")
    print(f"\nMiB. Largest errors over all ranks: {', '.join(f'{name} {error:.1%}' for name, error in worst.items())}.")
    good = all(worst[name] <= EXACT for name in HELD[:3]) and worst["peak"] <= ROUGH
    times = [(row["expected_seconds"], row["seconds"]) for row in shown.values()]
    if len(times) > 2:
        correlation = rank_correlation(*map(list, zip(*times, strict=True)))
        print(f"Rank correlation of {len(times)} step times: {correlation:.2f}.")
        good &= correlation >= 0.8 or len(times) < 12
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="layouts, as MODEL-LAYOUT; all without it")
    parser.add_argument("--rounds", type=int, default=2)
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
        measure(names, arguments.rounds, folder)
        return 0 if report(rows(names, folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
