"""The planner beside published tables: memory per ZeRO stage, and step times of large runs.

Nothing is measured here, and nothing was fitted to these tables. Theirs is what the source prints, ours what the
planner says of the same model, layout and device. `python benchmarks/planner_published.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from ds_train.config.load import validate
from ds_train.plan.facts import Facts
from ds_train.plan.memory import Choice
from ds_train.plan.predict import Prediction, Predictor
from ds_train.plan.topology import Cluster, Layout


class Row(NamedTuple):
    """A published figure and ours."""

    what: str
    theirs: float
    ours: float

    @property
    def error(self) -> float:
        """Ours over theirs, less 1."""
        return self.ours / self.theirs - 1


def gpt(hidden: int, layers: int, heads: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A GPT of the papers: learned positions, feed-forward of four times the width, tied embeddings."""
    return {
        "arch": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": length,
        "vocab_size": vocabulary, "activation_function": "gelu",
    }  # fmt: skip


def cut_gpt(hidden: int, layers: int, heads: int, length: int, vocabulary: int) -> dict[str, Any]:
    """The same sizes in a family whose head tensor ranks share, as Megatron's do; its positions are rotary."""
    return {
        "arch": "gpt_neox", "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": length, "vocab_size": vocabulary,
    }  # fmt: skip


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def predict(
    model: dict[str, Any], length: int, device: str, layout: Layout, stage: int, micro: int, accumulation: int,
    checkpointing: bool = False, dtype: str = "bf16", gradient_dtype: str = "fp32",
) -> Prediction:  # fmt: skip
    """What the planner says of one published run."""
    samples = micro * accumulation * layout.data
    run = validate({
        "model": model,
        "data": {"sequence_length": length},
        "batch": {"global_samples": samples, "micro_samples": micro},
        "parallel": {"pipeline": layout.pipe, "tensor": layout.tensor, "zero_stage": stage},
        "precision": {"dtype": dtype, "gradient_dtype": gradient_dtype},
        "schedule": {"steps": 1},
    })  # fmt: skip
    cluster = Cluster(layout.ranks, min(8, layout.ranks), "cuda", here=False, kind=device)
    predictor = Predictor.of(Facts(run, cluster))
    assert predictor is not None
    return predictor.predict(Choice(layout, stage, micro, accumulation, checkpointing=checkpointing))


# Billions of parameters, ranks, GB of model states per device at stages 1, 2, 3: table 1, with K = 12 in fp16.
ZERO_TABLE_1 = (
    (7.5, 4, 52.5, 41.3, 30.0), (7.5, 16, 35.6, 21.6, 7.5), (7.5, 64, 31.4, 16.6, 1.88), (7.5, 256, 30.4, 15.4, 0.47),
    (7.5, 1024, 30.1, 15.1, 0.12), (128, 4, 896, 704, 512), (128, 16, 608, 368, 128), (128, 64, 536, 284, 32.0),
    (128, 256, 518, 263, 8.0), (128, 1024, 513, 257, 2.0),
)  # fmt: skip
# Models of these sizes: hidden, layers, heads (the paper names none).
_SIZES = {7.5: (4096, 36, 32), 128: (12288, 70, 96)}


def zero_memory() -> Iterator[Row]:
    """Memory of model states per device by ZeRO stage (arXiv 1910.02054, table 1), scaled to the same parameters."""
    for billions, ranks, *published in ZERO_TABLE_1:
        hidden, layers, heads = _SIZES[billions]
        model = gpt(hidden, layers, heads, 1024, 50304) | NO_DROPOUT
        for stage, theirs in zip((1, 2, 3), published, strict=True):
            predicted = predict(model, 1024, "A100", Layout(1, ranks, 1, 1), stage, 1, 1, False, "fp16", "fp16")
            states = sum(predicted.worst.device[name] for name in ("parameters", "gradients", "optimizer"))
            parameters = 12 * layers * hidden**2 + (50304 + 1024) * hidden + layers * 13 * hidden + 2 * hidden
            ours = states / 1e9 * billions * 1e9 / parameters
            yield Row(f"{billions:g}B, {ranks} ranks, ZeRO-{stage}", theirs, ours)


# Parameters, hidden, layers, heads, tensor, pipe, global batch, micro-batch, seconds of an iteration, all recomputed.
RECOMPUTED = (
    ("22B", 6144, 48, 64, 8, 1, 4, 4, 1.42), ("175B", 12288, 96, 96, 8, 8, 64, 1, 18.13),
    ("530B", 20480, 105, 128, 8, 35, 280, 1, 49.05), ("1T", 25600, 128, 160, 8, 64, 512, 1, 94.42),
)  # fmt: skip


def megatron_steps() -> Iterator[Row]:
    """Seconds of an iteration on A100s, full recomputation (arXiv 2205.05198, table 5)."""
    for name, hidden, layers, heads, tensor, pipe, batch, micro, theirs in RECOMPUTED:
        layout = Layout(pipe, 1, 1, tensor)
        made = predict(
            cut_gpt(hidden, layers, heads, 2048, 51200), 2048, "A100", layout, 1, micro, batch // micro, True
        )
        assert made.step is not None
        yield Row(f"{name}, tensor {tensor}, pipe {pipe}, batch {batch}", theirs, made.step.seconds)


_MPT = {
    "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}  # fmt: skip
# Model, tokens of a sample, GPUs, micro-batch, accumulation, recomputation, model TFLOP/s of each GPU.
FULLY_SHARDED = (
    ("1b", 2048, 8, 14, 1, False, 414), ("1b", 2048, 64, 20, 1, False, 404), ("3b", 2048, 16, 10, 3, False, 433),
    ("3b", 8192, 8, 3, 6, False, 399), ("7b", 2048, 8, 6, 1, False, 460), ("7b", 8192, 8, 8, 2, True, 367),
    ("13b", 2048, 8, 2, 1, False, 394), ("13b", 2048, 64, 2, 1, False, 394), ("30b", 2048, 8, 3, 21, True, 377),
    ("30b", 2048, 32, 14, 3, True, 435), ("70b", 2048, 32, 2, 16, True, 358), ("70b", 2048, 64, 8, 4, True, 421),
)  # fmt: skip


def sharded_rates() -> Iterator[Row]:
    """Model TFLOP/s of H100s, fully sharded in bf16 (github.com/mosaicml/llm-foundry, scripts/train/benchmarking)."""
    for name, length, ranks, micro, accumulation, again, theirs in FULLY_SHARDED:
        hidden, layers, heads = _MPT[name]
        model = gpt(hidden, layers, heads, length, 50368) | NO_DROPOUT | {"attention": "flash_attention_2"}
        made = predict(model, length, "H100", Layout(1, ranks, 1, 1), 3, micro, accumulation, again)
        assert made.tflops_per_device is not None
        memory = made.worst.device_bytes / 2**30
        label = f"{name}, {length} tokens, {ranks} GPUs, micro-batch {micro}{', recomputed' if again else ''}"
        yield Row(f"{label} ({memory:.0f} GiB predicted)", theirs, made.tflops_per_device)


TABLES = (zero_memory, megatron_steps, sharded_rates)


def main() -> int:
    for table in TABLES:
        rows = list(table())
        print(f"{table.__doc__}\n\n| | theirs | ours | off by |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row.what} | {row.theirs:g} | {row.ours:.3g} | {row.error:+.0%} |")
        mean = sum(abs(row.error) for row in rows) / len(rows)
        print(f"\nmean of the errors' sizes: {mean:.0%}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
