"""Seconds from the command until the first step has ended, beside a DeepSpeed script with plain imports.

Both are started by the deepspeed launcher on two CPU ranks, with the same small Llama in ZeRO-2 and bf16, in turn. What
either compiles at first use is compiled before, and the data are prepared. A script that does nothing shows what the
launcher takes of both. `--docs` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from against_hf_trainer import write_corpus
from launching import started
from tables import machine, put_into_docs, show

MODEL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
RANKS, MICRO, LENGTH = 2, 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        sides = {
            "a DeepSpeed script with plain imports": lambda: rival(folder, corpus),
            "launch/train.py": lambda: ours(folder, corpus),
            "a script that does nothing": lambda: nothing(folder),
        }
        rounds = [[measure() for measure in sides.values()] for _ in range(options.rounds + 1)][1:]
    rows = []
    for side, words in enumerate(sides):
        seconds = sorted(one[side] for one in rounds)
        rows.append([words, f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} - {seconds[-1]:.1f})"])
    rows.insert(2, ["ratio", f"{statistics.median(mine / other for other, mine, _ in rounds):.2f}"])
    headings = ("", "seconds until the first step has ended")
    notes = [machine(), f"{RANKS} ranks, a Llama of two layers, {options.rounds} rounds in turn"]
    show(notes, headings, rows)
    if options.docs:
        put_into_docs("start", notes, headings, rows)


def rival(folder: Path, corpus: Path) -> float:
    path = folder / "job.json"
    path.write_text(json.dumps({"model": MODEL, "micro": MICRO, "length": LENGTH, "corpus": str(corpus)}))
    return until_said("benchmarks/rivals/plain_deepspeed.py", str(path))


def nothing(folder: Path) -> float:
    path = folder / "nothing.py"
    path.write_text("print('FIRST STEP', flush=True)")
    return until_said(str(path))


def until_said(*command: str) -> float:
    begin, end = time.monotonic(), 0.0
    with started(command, RANKS) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("FIRST STEP"):
                end = time.monotonic()
    return end - begin


def ours(folder: Path, corpus: Path) -> float:
    name = f"ours-{len(list(folder.glob('ours-*')))}"
    recipe = {
        "name": name,
        "run_root": str(folder),
        "model": {"arch": "llama", **MODEL},
        "data": {
            "source": "text", "path": str(corpus), "tokenizer": "bytes", "sequence_length": LENGTH,
            "validation_fraction": 0.0, "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_samples": MICRO * RANKS, "micro_samples": MICRO},
        "parallel": {"zero_stage": 2},
        "precision": {"dtype": "bf16"},
        "schedule": {"steps": 1},
        "checkpoint": {"save_final": False, "export": False},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    metrics, begin, end = folder / name / "metrics.jsonl", time.monotonic(), 0.0
    with started(["launch/train.py", str(path)], RANKS) as process:
        while process.poll() is None:
            if not end and metrics.is_file() and '"kind": "train"' in metrics.read_text():
                end = time.monotonic()
            time.sleep(0.02)
    return end - begin


if __name__ == "__main__":
    main()
