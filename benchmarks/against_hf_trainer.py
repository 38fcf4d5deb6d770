"""Tokens per second and peak memory against Hugging Face Trainer on DeepSpeed: same model, data, ranks and precision.

Both are started by the deepspeed launcher, in turn, several rounds; step times are medians within a run and over runs.
One table: placements of ranks and threads, vocabularies, and torch_compile on the rival's side; then the share of the
machine's own bf16 products that a step of ours reaches at hidden size 1024.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from launching import launch
from tables import machine, put_into_docs, show

LLAMA_34M = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
HIDDEN_1024 = LLAMA_34M | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16,
}  # fmt: skip
MICRO, LENGTH, STAGE, LR = 4, 512, 2, 3e-4


@dataclass(frozen=True)
class Setting:
    """What a row compares in: `rival_compiles` is torch_compile on the rival's side."""

    ranks: int
    threads: int
    vocabulary: int = LLAMA_34M["vocab_size"]
    rival_compiles: bool = False

    @property
    def model(self) -> dict[str, int]:
        return LLAMA_34M | {"vocab_size": self.vocabulary}

    @property
    def words(self) -> str:
        rival = ", rival compiled" if self.rival_compiles else ""
        return f"{self.ranks} x {self.threads}, vocabulary {self.vocabulary:,}{rival}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--placements", nargs="*", default=["2x1", "1x2"], help="ranks x threads of each")
    parser.add_argument("--vocabulary", nargs="*", type=int, default=[LLAMA_34M["vocab_size"]])
    parser.add_argument("--compile", action="store_true", help="torch_compile on the rival's side, in rows of its own")
    parser.add_argument("--share", action="store_true", help="the share of the machine's products at hidden size 1024")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", metavar="MARK", help="put the table where docs/performance.md has this mark")
    options = parser.parse_args()
    places = [tuple(map(int, place.split("x"))) for place in options.placements]
    settings = [
        Setting(ranks, threads, vocabulary, compiles)
        for ranks, threads in places
        for vocabulary in options.vocabulary
        for compiles in ([False, True] if options.compile else [False])
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        for setting in settings:
            rounds = [compared(folder, corpus, setting, options.steps) for _ in range(options.rounds)]
            rows.append(row(setting, rounds))
        share = measured_share(folder, corpus, places[0], options.steps) if options.share else None
    title = (
        f"34M Llama (with 8,192 tokens), bf16, ZeRO-{STAGE}, micro-batch {MICRO} x {LENGTH}, {options.rounds} rounds "
        f"of {options.steps} steps in turn; ranks x threads"
    )
    headings = (
        "", "tokens/s of HF Trainer", "of ds_train", "ratio", "peak MB of HF Trainer", "of ds_train", "ratio",
        "mean loss of both",
    )  # fmt: skip
    notes = [machine(), title]
    if share is not None:
        notes.append(share)
    show(notes, headings, rows)
    if options.docs:
        put_into_docs(options.docs, notes, headings, rows)


def write_corpus(folder: Path) -> Path:
    """2 MB of Python's standard library in one file: text that every machine has."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    path = folder / "corpus.txt"
    path.write_bytes(b"".join(file.read_bytes() for file in files)[:2_000_000].decode("utf-8", "ignore").encode())
    return path


def compared(folder: Path, corpus: Path, setting: Setting, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """One round: (the rival's, ours)."""
    return run_rival(folder, corpus, setting, steps), run_ours(folder, corpus, setting.model, setting, steps)


def run_rival(folder: Path, corpus: Path, setting: Setting, steps: int) -> dict[str, float]:
    job = asdict(setting) | {
        "model": setting.model, "micro": MICRO, "length": LENGTH, "stage": STAGE, "lr": LR, "steps": steps,
        "folder": str(folder), "corpus": str(corpus),
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    lines = launch(["benchmarks/rivals/hf_trainer.py", str(path)], setting.ranks, setting.threads).splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))


def recipe_of(folder: Path, corpus: Path, model: dict[str, int], ranks: int, steps: int) -> dict[str, Any]:
    """Our recipe of what the rival trains, each in a run of its own."""
    return {
        "name": f"ours-{len(list(folder.glob('ours-*')))}",
        "run_root": str(folder),
        "model": {"arch": "llama", "max_position_embeddings": LENGTH, **model},
        "data": {
            "source": "text", "path": str(corpus), "sequence_length": LENGTH,
            "validation_fraction": 0.0, "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_samples": MICRO * ranks, "micro_samples": MICRO},
        "parallel": {"zero_stage": STAGE},
        "precision": {"dtype": "bf16"},
        "optimizer": {"lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.01},
        "schedule": {"steps": steps, "kind": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"save_final": False, "export": False},
        "track": {"peak_tflops": 1.0},
    }  # fmt: skip


def run_ours(
    folder: Path, corpus: Path, model: dict[str, int], place: Setting, steps: int, peak: float | str = 1.0
) -> dict[str, float]:
    recipe = recipe_of(folder, corpus, model, place.ranks, steps)
    recipe["track"] = {"peak_tflops": peak}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launch(["launch/train.py", str(path)], place.ranks, place.threads)
    records = [json.loads(line) for line in (folder / recipe["name"] / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    return {
        "step_s": statistics.median(record["seconds"] for record in train[2:]),
        "peak_mb": max(record["memory_peak_mb"] for record in train),
        "loss": statistics.mean(record["loss"] for record in train),
        "share": statistics.median(record["mfu"] for record in train[2:]),
    }


def row(setting: Setting, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    tokens = setting.ranks * MICRO * LENGTH
    cells = [setting.words]
    for key, of in (("step_s", lambda value: tokens / value), ("peak_mb", lambda value: value)):
        for side in (0, 1):
            values = sorted(of(sides[side][key]) for sides in rounds)
            spread = f" ({values[0]:,.0f} - {values[-1]:,.0f})" if key == "step_s" else ""
            cells.append(f"{statistics.median(values):,.0f}{spread}")
        ratio = statistics.median(of(ours[key]) / of(rival[key]) for rival, ours in rounds)
        cells.append(f"{ratio:.2f}")
    losses = [statistics.mean(sides[side]["loss"] for sides in rounds) for side in (0, 1)]
    return [*cells, f"{losses[0]:.3f}, {losses[1]:.3f}"]


def measured_share(folder: Path, corpus: Path, place: tuple[int, ...], steps: int) -> str:
    ours = run_ours(folder, corpus, HIDDEN_1024, Setting(*place), steps, peak="auto")
    return (
        f"at hidden size 1024 ({place[0]} x {place[1]}) a step reaches {ours['share']:.0%} of the FLOP/s that the same "
        "ranks reach in bf16 products of 2048 x 2048"
    )


if __name__ == "__main__":
    main()
