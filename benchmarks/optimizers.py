"""Fused optimizers beside DeepSpeed's and torch's, in one process, in turn; least of all rounds.

The floor is Adam's own pattern of memory traffic, four arrays read and three written, without its arithmetic: what no
kernel can go below. DeepSpeed's CPU optimizers compile at first use (a minute).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ds_kernels import FusedAdagrad, FusedAdam, FusedAdamW, choose, global_norm
from rich.console import Console
from rich.table import Table
from torch import Tensor

FLOOR = r"""
#include <stdint.h>
// reads: p g m v; writes: p m v (Adam), or reads p g v and writes p v (Adagrad: m is null).
extern "C" void traffic(float *p, const float *g, float *m, float *v, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < n; at += 4096) {
    int64_t stop = at + 4096 < n ? at + 4096 : n;
    if (m) {
#pragma omp simd
      for (int64_t i = at; i < stop; i++) { float x = g[i] + v[i]; p[i] += x; m[i] += x; v[i] = x; }
    } else {
#pragma omp simd
      for (int64_t i = at; i < stop; i++) { float x = g[i] + v[i]; p[i] += x; v[i] = x; }
    }
  }
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--elements", type=int, default=48_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    console.print(f"{names}; {choose()}; {options.threads} threads, {options.elements:,} elements, "
                  f"least of {options.rounds} rounds in turn")  # fmt: skip
    for title, contenders in tables(options.elements, options.threads).items():
        report(console, title, least(contenders(), options.rounds))


def tables(elements: int, threads: int) -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """Contenders of each table, made when their turn comes: their tensors are large. The first is ours."""
    return {
        "Adam, fp32, one tensor": lambda: one_tensor(elements, threads),
        "Adam, fp32, 1000 tensors of 2048": many_tensors,
        "Adagrad, fp32, one tensor": lambda: adagrad(elements, threads),
        "L2 norm": lambda: norm(elements),
        "unscale, clip, Adam, bf16 copy": lambda: whole_update(elements),
        "ZeRO-2's phase: norm, cast of bf16 gradients, clip, Adam, bf16 copy": lambda: phase(elements),
    }


def least(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each contender's fastest round; they take turns, the first round isn't counted."""
    times = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                times[name] = min(times[name], time.perf_counter() - started)
    return times


def report(console: Console, title: str, times: dict[str, float]) -> None:
    table = Table(title=title)
    for heading in ("", "ms", "x ours"):
        table.add_column(heading, justify="right" if heading else "left")
    ours = times["ours"]
    for name, seconds in times.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / ours:.2f}")
    console.print(table)


def parameter(elements: int) -> Tensor:
    made = torch.nn.Parameter(torch.randn(elements))
    made.grad = torch.randn(elements)
    return made


def deepspeed_adam(parameters: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """DeepSpeed's, or nothing where it can't be compiled."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return {"DeepSpeedCPUAdam": DeepSpeedCPUAdam(parameters, lr=1e-4).step}
    except Exception as error:  # torch's extension builder raises whatever its compiler does
        print(f"DeepSpeedCPUAdam left out: {str(error).splitlines()[0]}")
        return {}


def floor(elements: int, threads: int, reads: int) -> Callable[[], Any]:
    folder = Path(tempfile.mkdtemp())
    (folder / "floor.cpp").write_text(FLOOR)
    command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "floor.cpp", "-o", "floor.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "floor.so"))
    arrays = [torch.randn(elements) for _ in range(4)]
    places = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
    if reads == 3:
        places[2] = ctypes.c_void_p(0)

    def run(keep: list[Tensor] = arrays) -> None:
        library.traffic(*places, ctypes.c_int64(elements), ctypes.c_int(threads))

    return run


def one_tensor(elements: int, threads: int) -> dict[str, Callable[[], Any]]:
    return {
        "ours": FusedAdam([parameter(elements)], lr=1e-4).step,
        "floor: 4 reads, 3 writes": floor(elements, threads, 4),
        **deepspeed_adam([parameter(elements)]),
        "torch fused": torch.optim.Adam([parameter(elements)], lr=1e-4, fused=True).step,
        "torch foreach": torch.optim.Adam([parameter(elements)], lr=1e-4, foreach=True).step,
    }


def many_tensors() -> dict[str, Callable[[], Any]]:
    def made() -> list[Tensor]:
        return [parameter(2048) for _ in range(1000)]

    return {
        "ours": FusedAdam(made(), lr=1e-4).step,
        **deepspeed_adam(made()),
        "torch fused": torch.optim.Adam(made(), lr=1e-4, fused=True).step,
        "torch foreach": torch.optim.Adam(made(), lr=1e-4, foreach=True).step,
    }


def adagrad(elements: int, threads: int) -> dict[str, Callable[[], Any]]:
    return {
        "ours": FusedAdagrad([parameter(elements)], lr=1e-4).step,
        "floor: 3 reads, 2 writes": floor(elements, threads, 3),
        "torch fused": torch.optim.Adagrad([parameter(elements)], lr=1e-4, fused=True).step,
        "torch foreach": torch.optim.Adagrad([parameter(elements)], lr=1e-4, foreach=True).step,
    }


def norm(elements: int) -> dict[str, Callable[[], Any]]:
    gradient = torch.randn(elements)
    exact = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    off = {"ours": global_norm([gradient]) / exact - 1, "torch": float(gradient.norm()) / exact - 1}
    print("off the float64 norm: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
    return {
        "ours": lambda: global_norm([gradient]),
        "torch, fp32": gradient.norm,
        "torch, summed in float64": lambda: torch.linalg.vector_norm(gradient, dtype=torch.float64),
    }


def whole_update(elements: int) -> dict[str, Callable[[], Any]]:
    mine, theirs = parameter(elements), parameter(elements)
    copies = [torch.empty(elements, dtype=torch.bfloat16) for _ in range(2)]
    fused = FusedAdamW([mine], lr=1e-4)
    fused.copies[mine], fused.grad_scale = copies[0], 0.5
    plain = torch.optim.AdamW([theirs], lr=1e-4, fused=True)

    def passes() -> None:
        theirs.grad.mul_(0.999)  # type: ignore[union-attr]
        plain.step()
        copies[1].copy_(theirs.detach())

    return {"ours": fused.step, "torch fused and a pass for each": passes}


def phase(elements: int) -> dict[str, Callable[[], Any]]:
    """From bf16 gradients to bf16 parameters, as DeepSpeed's ZeRO-2 does it on one rank, and in our two passes."""
    gradients = [torch.randn(size).bfloat16() for size in [elements // 40] * 40]
    mine, theirs = parameter(elements), parameter(elements)
    copies = [torch.empty(elements, dtype=torch.bfloat16) for _ in range(2)]
    flat = torch.cat(gradients)
    fused = FusedAdamW([mine], lr=1e-4)
    fused.copies[mine] = copies[0]
    mine.grad_dtype = None  # type: ignore[attr-defined]
    mine.grad = flat
    contenders = deepspeed_adam([theirs])
    step = contenders.get("DeepSpeedCPUAdam") or torch.optim.AdamW([theirs], lr=1e-4, fused=True).step

    def ours() -> None:
        fused.grad_scale = 1.0 / max(1.0, global_norm(gradients))
        torch.cat(gradients, out=flat)
        fused.step()

    def deepspeeds() -> None:
        norms = [torch.linalg.vector_norm(gradient.to(torch.float64)) for gradient in gradients]
        total = torch.stack(norms).pow(2).sum().float().sqrt()
        theirs.grad = torch.cat(gradients).to(torch.float32)
        theirs.grad.mul_(1.0 / torch.clamp(total, min=1.0))
        step()
        copies[1].copy_(theirs.detach())

    return {"ours": ours, "DeepSpeed's passes": deepspeeds}


if __name__ == "__main__":
    main()
