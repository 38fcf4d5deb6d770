"""SST-2 accuracy of int8 and int4 models, trained so or rounded afterwards, and of a half as deep student.

Real BERT weights and data as in sst2.py, fine-tuned for three epochs in fp32. From that model another
epoch is trained with rounded weights, and for comparison without; students start from half of its layers. Accuracies
are those of the exported folders in plain transformers. Sizes are those of the blocks' linear weights in the file,
beside what bits and scales add up to.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sst2 import DATA, accuracy, fine_tune, unpack_weights

GROUP = 64
KEEP = "[1,3,5]"
STEPS = {"fp32": 648, "student": 648, "more": 216}
"""Of 32 sentences: three epochs, three and one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[DATA])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="length of every run, as a share")
    parser.add_argument("--only", default="", help="names of rows, separated by commas; all without it")
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_args()
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        weights = unpack_weights(Path(root), options.data)
        for seed in range(1, options.seeds + 1):
            rows = _Rows(Path(root), weights, seed, options)
            for name, row in rows.all().items():
                if not options.only or name in ("fp32", *options.only.split(",")):
                    started = time.monotonic()
                    folder = row(name)
                    results.setdefault(name, []).append(accuracy(folder, options.data))
                    print(
                        f"seed {seed}  {name:24} {results[name][-1]:5.1f} %  {sizes(folder)}  "
                        f"({time.monotonic() - started:.0f} s)",
                        flush=True,
                    )
    if options.seeds > 1:
        for name, values in results.items():
            print(f"{name:24} {statistics.mean(values):5.1f} % +- {statistics.stdev(values):.1f}")


class _Rows:
    """What is compared: each row trains or rounds, and gives an exported folder."""

    def __init__(self, root: Path, weights: Path, seed: int, options: argparse.Namespace) -> None:
        self._root, self._weights, self._seed, self._options = root, weights, seed, options
        self._teacher = root / f"fp32-{seed}" / "export"

    def all(self) -> dict[str, Any]:
        from ds_train.checkpoint import offline

        def rounded(name: str, bits: int, group: int, method: Any) -> Path:
            folder = self._root / f"{name}-{self._seed}"
            offline.quantize(self._teacher.parent, folder, bits, group, method, None, 256)
            return folder

        taught = [
            "compress.distill.logits=forward-kl",
            "compress.distill.alpha=0.9", "compress.distill.temperature=4.0", "compress.distill.hidden=0.1",
        ]  # fmt: skip
        students = [f"model.keep_layers={KEEP}", "optimizer.lr=1.0e-4"]
        int8 = ["compress.quantize.weights=int8", "compress.quantize.activations=int8"]
        int4 = ["compress.quantize.weights=int4", f"compress.quantize.group={GROUP}"]
        return {
            "fp32": lambda name: self._train(name, self._weights, "fp32", "optimizer.lr=1.0e-4"),
            "int8 to nearest": lambda name: rounded(name, 8, 0, "rtn"),
            "int4 to nearest": lambda name: rounded(name, 4, GROUP, "rtn"),
            "int4 gptq": lambda name: rounded(name, 4, GROUP, "gptq"),
            "int4 awq": lambda name: rounded(name, 4, GROUP, "awq"),
            "fp32 more": lambda name: self._train(name, self._teacher, "more", "optimizer.lr=2.0e-5"),
            "int8 trained": lambda name: self._train(name, self._teacher, "more", "optimizer.lr=2.0e-5", *int8),
            "int4 trained": lambda name: self._train(name, self._teacher, "more", "optimizer.lr=2.0e-5", *int4),
            "3 layers": lambda name: self._train(name, self._teacher, "student", *students),
            "3 layers distilled": lambda name: self._train(name, self._teacher, "student", *students, *taught),
        }

    def _train(self, name: str, start: Path, length: str, *overrides: str) -> Path:
        own = f"{name.replace(' ', '-')}-{self._seed}"
        steps = max(1, round(STEPS[length] * self._options.scale))
        keys = [
            f"data.cache_dir={self._root / 'cache'}", "schedule.epochs=null", f"schedule.steps={steps}",
            "track.eval_every_steps=null", "track.eval_samples=32", *overrides, *self._options.overrides,
        ]  # fmt: skip
        options = self._options
        return fine_tune(start, self._root / own, options.data, self._seed, options.ranks, *keys) / "export"


def sizes(folder: Path) -> str:
    """Megabytes of the blocks' linear layers in the file, and by arithmetic: bits of each weight and its scales."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    found = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if ".layer." in name and name.rpartition(".")[2].startswith("weight") and tensor.dim() > 1:
                    found += tensor.numel() * tensor.element_size()
    config = AutoConfig.from_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    count = config.num_hidden_layers * (4 * hidden**2 + 2 * hidden * inner)
    rows = config.num_hidden_layers * (5 * hidden + inner)
    quantized = getattr(config, "quantization_config", None)
    width = 2 if config.dtype == torch.bfloat16 else 4
    expected = width * count
    if quantized is not None:
        weights = quantized["config_groups"]["group_0"]["weights"]
        group = weights.get("group_size")
        expected = count * weights["num_bits"] // 8 + width * (count // group if group else rows)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{found / 1e6:6.2f} MB in blocks, {expected / 1e6:6.2f} by arithmetic, {total / 1e6:6.2f} in all"


if __name__ == "__main__":
    main()
