"""Tokens per second and peak memory against Hugging Face Trainer on DeepSpeed: same model, data, ranks and precision.

Both are started by the deepspeed launcher, in turn, several rounds; step times are medians within a run and over runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from launching import launch
from rich.console import Console
from rich.table import Table

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="OMP threads of a rank")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rival-compiles", action="store_true", help="torch_compile on the rival's side")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"model": MODEL, "lr": 3e-4, "folder": folder, "corpus": str(write_corpus(Path(folder)))}
        # One uncounted round: the rival's DeepSpeed compiles its collectives at first use.
        results = [(run_rival(job), run_ours(job)) for _ in range(options.rounds + 1)][1:]
    report(options, [rival for rival, _ in results], [ours for _, ours in results])


def write_corpus(folder: Path) -> Path:
    """2 MB of Python's standard library in one file: text that every machine has."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    path = folder / "corpus.txt"
    path.write_bytes(b"".join(file.read_bytes() for file in files)[:2_000_000].decode("utf-8", "ignore").encode())
    return path


def run_rival(job: dict[str, Any]) -> dict[str, float]:
    path = Path(job["folder"]) / "job.json"
    path.write_text(json.dumps(job))
    lines = launch(["benchmarks/rivals/hf_trainer.py", str(path)], job["ranks"], job["threads"]).splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))


def run_ours(job: dict[str, Any]) -> dict[str, float]:
    folder = Path(job["folder"])
    recipe = {
        "name": f"ours-{len(list(folder.glob('ours-*')))}",
        "run_root": str(folder),
        "model": {"arch": "llama", "max_position_embeddings": job["length"], **MODEL},
        "data": {
            "source": "text", "path": job["corpus"], "sequence_length": job["length"],
            "validation_fraction": 0.0, "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_samples": job["micro"] * job["ranks"], "micro_samples": job["micro"]},
        "parallel": {"zero_stage": job["stage"]},
        "precision": {"dtype": "bf16"},
        "optimizer": {"lr": job["lr"], "betas": [0.9, 0.999], "weight_decay": 0.01},
        "schedule": {"steps": job["steps"], "kind": "linear", "warmup_fraction": 0.0, "final_ratio": 0.0},
        "checkpoint": {"save_final": False, "export": False},
        "track": {"peak_tflops": 1.0},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launch(["launch/train.py", str(path)], job["ranks"], job["threads"])
    records = [json.loads(line) for line in (folder / recipe["name"] / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    return {
        "step_s": statistics.median(record["seconds"] for record in train[2:]),
        "peak_mb": max(record["memory_peak_mb"] for record in train),
        "loss": statistics.mean(record["loss"] for record in train),
    }


def report(options: argparse.Namespace, rivals: list[dict[str, float]], ours: list[dict[str, float]]) -> None:
    tokens = options.ranks * options.micro * options.length
    console = Console(width=120)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "ds_train"))
    console.print(f"{names}; Python {platform.python_version()}; {platform.processor() or platform.machine()}")
    table = Table(
        title=f"34M Llama, bf16, ZeRO-{options.stage}, {options.ranks} ranks x {options.threads} threads, "
        f"micro-batch {options.micro} x {options.length}, {options.rounds} rounds in turn"
    )
    for heading in ("", "tokens/s (min - max)", "peak MB of rank 0", "mean loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, runs in (("HF Trainer + DeepSpeed", rivals), ("ds_train", ours)):
        rates = sorted(tokens / run["step_s"] for run in runs)
        table.add_row(
            name,
            f"{statistics.median(rates):.0f} ({rates[0]:.0f} - {rates[-1]:.0f})",
            f"{statistics.median(run['peak_mb'] for run in runs):.0f}",
            f"{statistics.mean(run['loss'] for run in runs):.4f}",
        )
    console.print(table)
    speed = statistics.median(rival["step_s"] / our["step_s"] for rival, our in zip(rivals, ours, strict=True))
    memory = statistics.median(our["peak_mb"] / rival["peak_mb"] for rival, our in zip(rivals, ours, strict=True))
    console.print(f"tokens/s: {speed:.2f} x the rival's; peak memory: {memory:.2f} x the rival's")


if __name__ == "__main__":
    main()
