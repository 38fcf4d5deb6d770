"""Fused optimizers on a GPU beside torch's, DeepSpeed's and Apex's, in one process, in turn; least of all rounds.

The share is of the GPU's own copy bandwidth: bytes that the update must move, by its time, over the bytes per second of
a device-to-device copy. DeepSpeed's compiles at first use; Apex is left out where it isn't installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from ds_kernels import FusedAdagrad, FusedAdam, FusedAdamW, choose, norm_and_flag
from rich.console import Console
from rich.table import Table
from torch import Tensor

Contenders = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--elements", type=int, default=256_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    choice = choose("cuda")
    if not choice.fused:
        print(f"left out: {choice}")
        return
    console = Console(width=110)
    copies = copy_bandwidth(options.elements, options.rounds)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {choice}")
    console.print(f"{options.elements:,} elements, least of {options.rounds} rounds in turn; "
                  f"a copy moves {copies / 1e9:.0f} GB/s")  # fmt: skip
    many = 2048 * 1000
    tables: dict[str, tuple[Callable[[], Contenders], int]] = {
        "Adam, fp32, one tensor": (lambda: adam([options.elements]), 28 * options.elements),
        "Adam, fp32, 1000 tensors of 2048": (lambda: adam([2048] * 1000), 28 * many),
        "Adagrad, fp32, one tensor": (lambda: adagrad(options.elements), 20 * options.elements),
        "L2 norm, fp32": (lambda: norm(options.elements), 4 * options.elements),
        "AdamW of bf16 gradients, unscale, clip, bf16 copy": (lambda: whole(options.elements), 28 * options.elements),
    }
    for title, (contenders, moved) in tables.items():
        report(console, title, least(contenders(), options.rounds), moved, copies)
        torch.cuda.empty_cache()


def least(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Seconds of each contender's fastest round by the device's clock; two rounds aren't counted."""
    times = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds + 2):
        for name, run in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if number > 1:
                times[name] = min(times[name], begin.elapsed_time(end) / 1e3)
    return times


def report(console: Console, title: str, times: dict[str, float], moved: int, copies: float) -> None:
    table = Table(title=title)
    for heading in ("", "ms", "x ours", "share of copy bandwidth"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds in times.items():
        share = moved / seconds / copies
        table.add_row(name, f"{seconds * 1e3:.3f}", f"{seconds / times['ours']:.2f}", f"{share:.1%}")
    console.print(table)


def copy_bandwidth(elements: int, rounds: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    return 8 * elements / least({"copy": lambda: target.copy_(source)}, rounds)["copy"]


def parameters_of(sizes: list[int]) -> list[Tensor]:
    made = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def others(sizes: list[int]) -> Contenders:
    """DeepSpeed's and Apex's FusedAdam, where they are installed and can be compiled."""
    found: Contenders = {}
    for name, place in (("DeepSpeed", "deepspeed.ops.adam"), ("Apex", "apex.optimizers")):
        try:
            kind = __import__(place, fromlist=["FusedAdam"]).FusedAdam
            found[name] = kind(parameters_of(sizes), lr=1e-4).step
        except Exception as error:  # whatever a compiler, an import or a driver raises
            print(f"{name} left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
    return found


def adam(sizes: list[int]) -> Contenders:
    return {
        "ours": FusedAdam(parameters_of(sizes), lr=1e-4).step,
        "torch fused": torch.optim.Adam(parameters_of(sizes), lr=1e-4, fused=True).step,
        "torch foreach": torch.optim.Adam(parameters_of(sizes), lr=1e-4, foreach=True).step,
        **others(sizes),
    }


def adagrad(elements: int) -> Contenders:
    return {
        "ours": FusedAdagrad(parameters_of([elements]), lr=1e-4).step,
        "torch foreach": torch.optim.Adagrad(parameters_of([elements]), lr=1e-4, foreach=True).step,
    }


def norm(elements: int) -> Contenders:
    gradient = torch.randn(elements, device="cuda")
    return {
        "ours": lambda: norm_and_flag([gradient]),
        "torch, fp32": gradient.norm,
        "torch, summed in float64": lambda: torch.linalg.vector_norm(gradient, dtype=torch.float64),
    }


def whole(elements: int) -> Contenders:
    """bf16 gradients in, fp32 parameters and their bf16 copy out."""
    mine, theirs = (torch.nn.Parameter(torch.randn(elements, device="cuda")) for _ in range(2))
    gradient = torch.randn(elements, device="cuda").bfloat16()
    copies = [torch.empty_like(gradient) for _ in range(2)]
    mine.grad_dtype = None  # type: ignore[attr-defined]
    mine.grad = gradient
    ours = FusedAdamW([mine], lr=1e-4)
    ours.copies[mine], ours.grad_scale = copies[0], 0.5
    torchs = torch.optim.AdamW([theirs], lr=1e-4, fused=True)

    def passes() -> None:
        theirs.grad = gradient.float()
        theirs.grad.mul_(0.999)
        torchs.step()
        copies[1].copy_(theirs.detach())

    return {"ours": ours.step, "torch fused and a pass for each": passes}


if __name__ == "__main__":
    main()
