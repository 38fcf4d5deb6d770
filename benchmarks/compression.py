"""BERT made smaller on SST-2: pruned with its own teacher, and in four other ways at equal size and equal tokens.

Weights and data are those of sst2.py. They are fine-tuned for three epochs, which gives the model that is to be made
smaller; every smaller one is then trained for as many steps. Accuracies are those of the exported folders on the dev
set, in plain transformers; times are of them too (fp32, batches of 32 x 64 tokens, this CPU), the models taking turns.

    narrower, distilled   hidden size, heads and channels go during training, the fine-tuned model teaches
    pruned, distilled     layers and channels go
    magnitude             as in the second, by the weights' size; no teacher
    fewer layers          evenly spaced layers of the fine-tuned model are kept; no teacher
    Torch-Pruning         that package makes it as narrow as the first (its Taylor scores on 512 sentences)
    from scratch          random weights of the second's sizes
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launching import folder_of
from sst2 import DATA, accuracy, fine_tune, labelled, unpack_weights

BATCH, LENGTH, ROUNDS = 32, 64, 15
STEPS = 648
"""Of 32 sentences: three epochs."""

WHEN = ["compress.prune.start=0.1", "compress.prune.end=0.4", "compress.prune.score_steps=32"]
TAUGHT = ["compress.distill.logits=forward-kl", "compress.distill.alpha=0.9", "compress.distill.temperature=4.0"]
SIZES: dict[str, dict[str, Any]] = {
    "50 %": {"layers": 2, "ffn": 0.385, "hidden": 0.25, "channels": 952, "kept": [0, 2, 5]},
    "70 %": {"layers": 3, "ffn": 0.61, "hidden": 0.417, "channels": 728, "kept": [0, 5]},
}
"""What goes of 6 layers with 1536 channels each, or of the hidden size 384 (with its heads of 32) and the channels that
stay then; layers that are kept instead. Each is at least that share of the encoder, but two whole layers are 67 %."""

_LITTLE = 1e-6
"""Less goes by Torch-Pruning than is asked for, since it rounds what stays down: 223.9999 channels to 223."""

LAYOUTS = {"ZeRO-3 on 2 ranks": ["parallel.zero_stage=3"], "tensor 2": ["parallel.tensor=2"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[DATA]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="length of every run, as a share")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""], help="rows with one of these in their names, and the first"
    )
    parser.add_argument("--layouts", action="store_true", help="the first seed's 50 % in other layouts too")
    parser.add_argument("--folder", type=Path, help="keep the runs there, and go on after those that are there")
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_intermixed_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = options.folder.resolve() if options.folder else Path(name)
        weights = unpack_weights(root, options.data)
        for seed in options.seeds:
            for row, train in rows(root, weights, seed, options).items():
                if row != "fine-tuned" and not any(word in row for word in options.only):
                    continue
                started = time.monotonic()
                found.setdefault(row, []).append(accuracy(train(), options.data))
                seconds = time.monotonic() - started
                print(f"seed {seed}  {row:26} {found[row][-1]:5.1f} %  ({seconds:.0f} s)", flush=True)
        models = {row: load(folder_of(root, row, options.seeds[0]) / "export") for row in found}
        times, whole = inference(models), encoder(models["fine-tuned"])
        for row, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            size = encoder(models[row])
            print(
                f"{row:26} {statistics.mean(values):5.1f} % +- {spread:.1f}  encoder {size / 1e6:5.2f} M "
                f"({1 - size / whole:.1%} less)  {1e3 * times[row]:6.1f} ms a batch "
                f"({times['fine-tuned'] / times[row]:.2f} x)",
                flush=True,
            )


def rows(root: Path, weights: Path, seed: int, options: argparse.Namespace) -> dict[str, Callable[[], Path]]:
    """What is compared: each trains, and gives an exported folder. The first is what the others start from."""
    steps = max(1, round(STEPS * options.scale))
    lengths = [
        f"data.cache_dir={root / 'cache'}", "schedule.epochs=null", f"schedule.steps={steps}", "optimizer.lr=1.0e-4",
        "track.eval_every_steps=null", "track.eval_samples=32",
    ]  # fmt: skip
    teacher = folder_of(root, "fine-tuned", seed) / "export"

    def run(row: str, start: Path | None, *keys: str, ranks: int = options.ranks) -> Callable[[], Path]:
        def train() -> Path:
            folder = folder_of(root, row, seed)
            if (folder / "export").is_dir():
                return folder / "export"
            own = start or folder.with_name(f"{folder.name}-start")
            every = (*lengths, *keys, *options.overrides)
            return fine_tune(own, folder, options.data, seed, ranks, *every) / "export"

        return train

    all_rows = {"fine-tuned": run("fine-tuned", weights)}
    for share, size in SIZES.items():
        narrow = [f"compress.prune.{key}={size['hidden']}" for key in ("hidden", "heads")]
        narrow += [f"compress.prune.ffn={1 - (size['channels'] - 0.5) / 1536:.5f}", *WHEN]
        row = f"{share} narrower, distilled"
        all_rows[row] = run(row, teacher, *narrow, *TAUGHT)
        shares = [f"compress.prune.layers={size['layers']}", f"compress.prune.ffn={size['ffn']}", *WHEN]
        ours = f"{share} pruned, distilled"
        all_rows[ours] = run(ours, teacher, *shares, *TAUGHT)
        if options.layouts and share == "50 %" and seed == options.seeds[0]:
            for layout, keys in LAYOUTS.items():
                row = f"{share}, {layout}"
                all_rows[row] = run(row, teacher, *shares, *TAUGHT, *keys, ranks=2)
        row = f"{share} magnitude"
        all_rows[row] = run(row, teacher, *shares, "compress.prune.score=magnitude")
        row = f"{share} fewer layers"
        all_rows[row] = run(row, teacher, f"model.keep_layers={str(size['kept']).replace(' ', '')}")
        if find_spec("torch_pruning"):
            row = f"{share} Torch-Pruning"
            all_rows[row] = _after(
                partial(torch_pruned, options.data), teacher, size, run(row, None), folder_of(root, row, seed)
            )
        else:
            print("no row of Torch-Pruning: pip install torch-pruning", flush=True)
        row = f"{share} from scratch"
        all_rows[row] = _after(random_weights, folder_of(root, ours, seed) / "export", seed, run(row, None),
                               folder_of(root, row, seed))  # fmt: skip
    return all_rows


def _after(make: Callable[..., None], origin: Path, what: Any, train: Callable[[], Path], run: Path) -> Any:
    def made_then_trained() -> Path:
        make(origin, run.with_name(f"{run.name}-start"), what)
        return train()

    return made_then_trained


def random_weights(origin: Path, folder: Path, seed: int) -> None:
    """A model of the sizes of `origin`, beside its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(origin, dtype=torch.float32)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def torch_pruned(data: Path, origin: Path, folder: Path, size: dict[str, Any]) -> None:
    """What Torch-Pruning leaves of the model."""
    import torch
    import torch_pruning
    from transformers import AutoTokenizer

    model, tokenizer = load(origin), AutoTokenizer.from_pretrained(origin)
    config = model.config
    sentences = labelled(data, "train")[:512]
    for start in range(0, len(sentences), BATCH):
        part = sentences[start : start + BATCH]
        batch = tokenizer([text for text, _ in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        model(**batch, labels=torch.tensor([label for _, label in part])).loss.backward()
    heads, channels = {}, {}
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        for projection in (attention.query, attention.key, attention.value):
            heads[projection] = config.num_attention_heads
        channels[layer.intermediate.dense] = 1 - size["channels"] / config.intermediate_size - _LITTLE
    left = round((1 - size["hidden"]) * config.num_attention_heads)
    share = 1 - left / config.num_attention_heads - _LITTLE
    pruner = torch_pruning.pruner.BasePruner(
        model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}, torch_pruning.importance.TaylorImportance(),
        pruning_ratio=share, pruning_ratio_dict=channels, ignored_layers=[model.classifier], num_heads=heads,
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=share,
        output_transform=lambda output: output.logits,
    )  # fmt: skip
    pruner.step()
    config.hidden_size = config.hidden_size * left // config.num_attention_heads
    config.num_attention_heads, config.intermediate_size = left, size["channels"]
    smaller = type(model)(config)
    smaller.load_state_dict(model.state_dict())
    smaller.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The model in `folder`, in fp32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def encoder(model: Any) -> int:
    """Parameters of its layers."""
    return sum(parameter.numel() for parameter in model.bert.encoder.parameters())


def inference(models: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a batch, the models taking turns after a warm-up."""
    import torch

    tokens = torch.randint(1000, 20000, (BATCH, LENGTH))
    seconds: dict[str, list[float]] = {row: [] for row in models}
    with torch.inference_mode():
        for round_ in range(ROUNDS + 2):
            for row, model in models.items():
                started = time.perf_counter()
                model(input_ids=tokens)
                if round_ >= 2:
                    seconds[row].append(time.perf_counter() - started)
    return {row: statistics.median(found) for row, found in seconds.items()}


if __name__ == "__main__":
    main()
