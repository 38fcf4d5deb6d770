"""Tokens per second and peak memory against Hugging Face Trainer on DeepSpeed: same model, data, ranks and precision.

Both are started by the deepspeed launcher, in turn, several rounds, from the same weights, and see the same windows of
text in the same order, so that their losses can be compared. Step times are medians within a run and over runs.
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

import numpy as np
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
    recipe = recipe_of(folder, corpus, setting.model, setting.ranks, steps)
    return run_rival(folder, recipe, setting), run_ours(folder, recipe, setting)


def run_rival(folder: Path, recipe: dict[str, Any], setting: Setting) -> dict[str, float]:
    job = asdict(setting) | {
        "weights": recipe["model"]["path"], "micro": MICRO, "stage": STAGE, "lr": LR,
        "steps": recipe["schedule"]["steps"], "folder": str(folder), "windows": str(write_windows(folder, recipe)),
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    lines = launch(["benchmarks/rivals/hf_trainer.py", str(path)], setting.ranks, setting.threads).splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))


def write_weights(folder: Path, model: dict[str, int]) -> Path:
    """A Llama of these sizes with random weights, which both start from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"weights-{model['hidden_size']}-{model['vocab_size']}"
    if not path.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(max_position_embeddings=LENGTH, **model)).save_pretrained(path)
    return path


def write_windows(folder: Path, recipe: dict[str, Any]) -> Path:
    """The samples of the recipe's run in their order: `input_ids` and `labels`, which are shifted, (samples, T)."""
    from ds_train.config.load import validate
    from ds_train.data.build import open_samples
    from ds_train.data.order import Order
    from ds_train.data.prepare import prepare

    run = validate(recipe)
    samples = open_samples(run, prepare(run), "train")
    assert samples is not None
    places = np.arange(recipe["schedule"]["steps"] * run.batch.global_samples)
    taken = [samples[index] for index in Order(len(samples), run.seed).index(places).tolist()]
    path = folder / "windows.npz"
    np.savez(path, **{key: np.stack([sample[key] for sample in taken]) for key in ("input_ids", "labels")})
    return path


def recipe_of(folder: Path, corpus: Path, model: dict[str, int], ranks: int, steps: int) -> dict[str, Any]:
    """Our recipe of what the rival trains, each in a run of its own."""
    return {
        "name": f"ours-{len(list(folder.glob('ours-*')))}",
        "run_root": str(folder),
        "model": {"path": str(write_weights(folder, model))},
        "data": {
            "source": "text", "path": str(corpus), "tokenizer": "bytes", "sequence_length": LENGTH,
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


def run_ours(folder: Path, recipe: dict[str, Any], place: Setting) -> dict[str, float]:
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
    return [*cells, f"{losses[0]:.4f}, {losses[1]:.4f}"]


def measured_share(folder: Path, corpus: Path, place: tuple[int, ...], steps: int) -> str:
    recipe = recipe_of(folder, corpus, HIDDEN_1024, place[0], steps) | {"track": {"peak_tflops": "auto"}}
    ours = run_ours(folder, recipe, Setting(*place))
    return (
        f"at hidden size 1024 ({place[0]} x {place[1]}) a step reaches {ours['share']:.0%} of the FLOP/s that the same "
        "ranks reach in bf16 products of 2048 x 2048"
    )


if __name__ == "__main__":
    main()
