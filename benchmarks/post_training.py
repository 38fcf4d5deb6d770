"""Held-out loss of a small Llama after post-training quantization: to nearest, by GPTQ and by AWQ.

A model of bytes in the form of ds_configs/quickstart.yaml, trained on the standard library for some minutes, is rounded
to 4 and 8 bits in each way. Losses are those of the packed folders, loaded by transformers alone, over the same
held-out windows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from launching import launch

METHODS = ("rtn", "gptq", "awq")
SIZE = {"model.hidden_size": 128, "model.intermediate_size": 384, "data.sequence_length": 128, "schedule.steps": 800}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64, help="windows that gptq and awq look at")
    parser.add_argument("--held-out", type=int, default=64, help="windows that losses are means of")
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        run = Path(root) / "small"
        keys = [
            f"name={run.name}", f"run_root={run.parent}", f"data.cache_dir={root}/cache", "checkpoint.save_final=false",
            "checkpoint.every_steps=null", "track.sample_prompt=null", "track.peak_tflops=1.0", "data.tokenizer=bytes",
            "data.train_vocabulary=null", "optimizer.lr=4.0e-3", *(f"{key}={value}" for key, value in SIZE.items()),
            *options.overrides,
        ]  # fmt: skip
        launch(["launch/train.py", "ds_configs/quickstart.yaml", *keys], options.ranks)
        batches = held_out(run, options.held_out)
        whole = loss(run / "export", batches)
        print(f"{'fp32':20} {whole:.4f}")
        for bits, group in ((8, 0), (4, 0), (4, 64)):
            for method in METHODS:
                rounded = loss(quantized(run, bits, group, method, options.samples), batches)
                print(f"int{bits} group {group:<3} {method:6} {rounded:.4f}  ({rounded - whole:+.4f})", flush=True)


def quantized(run: Path, bits: int, group: int, method: Any, samples: int) -> Path:
    """The packed folder."""
    from ds_train.checkpoint import offline

    folder = run.parent / f"{method}-{bits}-{group}"
    offline.quantize(run, folder, bits, group, method, None, samples)
    return folder


def held_out(run: Path, count: int) -> list[dict[str, Any]]:
    """Micro-batches of the run's held-out windows."""
    from ds_train.config import load
    from ds_train.data.build import load_data
    from ds_train.data.prepare import prepare, prepared_tokenizer

    recipe = load(run / "recipe.yaml")
    folder = prepare(recipe)
    data = load_data(
        recipe, folder=folder, tokenizer=prepared_tokenizer(folder), data_rank=0, data_ranks=1, micro_samples=8,
        eval_micro_samples=8,
    )  # fmt: skip
    assert data.validation is not None
    return list(data.validation.eval(count))


def loss(folder: Path, batches: list[dict[str, Any]]) -> float:
    """Nats per label of the model in `folder`, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = labels = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits.flatten(0, 1)
            kept = batch["labels"].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, kept, reduction="sum"))
            labels += float((kept != -100).sum())
    return total / labels


if __name__ == "__main__":
    main()
