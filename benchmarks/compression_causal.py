"""A Llama of the standard library made 30 and 50 % smaller while it trains, with a teacher: held-out loss.

Every run begins with random weights and sees the same tokens: the large model; one that is as large and is pruned in
the first third of its run, taught by the large one as it was at its end; and one that is as small from the start. What
the teacher was trained on comes on top for the pruned one. All hold out the same documents; losses are nats per token
of one tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from launching import ROOT, folder_of, launch
from safetensors import safe_open

from ds_train.track.metrics import read_metrics

Result = tuple[int, float]
"""Parameters and held-out loss."""

SHARES = (0.3, 0.5)
LARGE = {
    "arch": "llama", "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip
PRUNE = {"heads": 0.5, "ffn": 0.5, "start": 0.05, "end": 0.3}
DISTILL = {"logits": "forward-kl", "alpha": 0.5}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000, help="of every run, of 32 windows of 128 tokens")
    parser.add_argument("--folder", type=Path, help="keep the runs there, and go on after those that are there")
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_intermixed_args()
    found: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = options.folder.resolve() if options.folder else Path(name)
        root.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for row, result in rows(root, seed, options):
                found.setdefault(row, []).append(result)
    for row, results in found.items():
        losses = [loss for _, loss in results]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{row:26} {results[0][0]:>10,} parameters  {statistics.mean(losses):.4f} +- {spread:.4f}")


def rows(root: Path, seed: int, options: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Names and results, one run after the other."""

    def train(row: str, model: dict[str, Any], **sections: Any) -> Result:
        started = time.monotonic()
        run = folder_of(root, row, seed)
        recipe = yaml.safe_load((ROOT / "ds_configs" / "llama_prune.yaml").read_text()) | {
            "name": run.name, "run_root": str(root), "seed": seed, "model": model, "compress": {},
            "track": {"peak_tflops": 1.0, "eval_samples": 3000},
            "checkpoint": {"save_final": False},
        }  # fmt: skip
        recipe["data"] |= {
            "train_vocabulary": 512, "sequence_length": 128, "validation_fraction": 0.05,
            "cache_dir": str(root / "cache"),
        }  # fmt: skip
        recipe["batch"] |= {"global_samples": 32}
        recipe["optimizer"] |= {"lr": 4e-3}
        recipe["schedule"] |= {"steps": options.steps, "kind": "cosine"}
        for name, keys in sections.items():
            recipe[name] = recipe[name] | keys
        if not (run / "export").is_dir():
            file = root / f"{run.name}.yaml"
            file.write_text(yaml.safe_dump(recipe))
            launch(["launch/train.py", str(file), *options.overrides], options.ranks)
        losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"]
        result = parameters(run / "export"), losses[-1]
        seconds = time.monotonic() - started
        print(f"seed {seed}  {row:26} {result[0]:>10,} parameters  {result[1]:.4f}  ({seconds:.0f} s)", flush=True)
        return result

    whole = train("large", LARGE)
    yield "large", whole
    export = str(folder_of(root, "large", seed) / "export")
    words = {"tokenizer": export, "train_vocabulary": None}
    for share in SHARES:
        row = f"{share:.0%} pruned, distilled"
        target = {"parameters": round((1 - share) * whole[0])}
        compress = {"prune": PRUNE | target, "distill": DISTILL | {"teacher": export}}
        yield row, train(row, LARGE, data=words, compress=compress)
        config = json.loads((folder_of(root, row, seed) / "export" / "config.json").read_text())
        row = f"{share:.0%} smaller from scratch"
        yield row, train(row, LARGE | {size: config[size] for size in SIZES}, data=words)


def parameters(folder: Path) -> int:
    """Numbers in the safetensors of `folder`."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


if __name__ == "__main__":
    main()
