"""`ds-train calibrate`: what this machine's devices and links do, measured by all ranks of a host at once.

Ranks of a CPU share its cores, memory and caches, so each number of ranks is measured by itself: matrix products and
memory traffic while every rank works, real all-reduces between them. Each figure is the best of several rounds.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_train.engine.port import free_port
from ds_train.errors import user_error
from ds_train.plan.hardware import TABLE, Hardware, Link
from ds_train.plan.topology import Device

_TIMEOUT_S = 300
_POLL_S = 0.05
_ROUNDS = 5
_WINDOW_S = 0.2
_PAIRS = 8
# Rows, inputs and outputs of the products: a micro-batch through a feed-forward of a small model, and of a large one.
_PRODUCT = {"cpu": (512, 512, 1408)}
_PRODUCT_ON_DEVICES = (8192, 8192, 8192)
_TRAFFIC_BYTES = {"cpu": 2 * 2**20}
_TRAFFIC_ON_DEVICES = 256 * 2**20
_LARGE_MESSAGE = {"cpu": 4 * 2**20}
_LARGE_ON_DEVICES = 256 * 2**20
_SMALL_MESSAGE = 1024


def default_counts(device: Device) -> list[int]:
    """1, 2, 4 ... to all devices of the host, on CPUs to twice its cores."""
    if device == "cpu":
        most = 2 * len(os.sched_getaffinity(0))
    else:
        import torch

        most = torch.accelerator.device_count()
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def calibrate(device: Device, counts: Sequence[int], note: Callable[[str], None]) -> Hardware:
    """Measure this machine with each number of ranks in `counts`.

    Raises:
        UserError: the ranks can't run here, with their words.
    """
    totals: dict[str, dict[str, float]] = {}
    for count in counts:
        note(f"measuring with {count} rank{'s' if count > 1 else ''}")
        totals[str(count)] = _measured(device, count)
    best = totals[str(counts[-1])]
    last = counts[-1]
    table = TABLE["CPU" if device == "cpu" else "H100"]
    return replace(
        table,
        name=f"{os.uname().nodename} ({device})",
        device=device,
        memory_bytes=None if device == "cpu" else int(best["device_memory_bytes"]),
        flops={dtype: best[f"flops_{dtype}"] / last for dtype in table.flops},
        attainable=1.0,
        memory_bytes_per_second=best["memory_bytes_per_second"] / last,
        near=Link(best["link_bytes_per_second"] / last, best["link_latency_s"]),
        host_link=Link(best["host_link_bytes_per_second"], table.host_link.latency_s),
        kernel_s=totals[str(counts[0])]["kernel_s"],
        source="ds-train calibrate",
        measured=True,
        totals=totals,
    )


def _measured(device: Device, count: int) -> dict[str, float]:
    """Figures of `count` ranks together: sums of rates, the slowest rank's latencies."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count}
            env = os.environ | {name: str(value) for name, value in place.items()}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": device}
            env.setdefault("OMP_NUM_THREADS", "1")
            log = (Path(folder) / f"{rank}.log").open("wb")
            command = [sys.executable, "-m", "ds_train.engine.calibrate", str(Path(folder) / f"{rank}.json")]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            log.close()
        try:
            failed = _first_failed(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            words = (Path(folder) / f"{failed}.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise user_error(
                "calibrate", f"{count} ranks couldn't be measured: {''.join(words) or f'no answer in {_TIMEOUT_S} s'}",
                "give fewer ranks with --ranks, or name the device", device,
            )  # fmt: skip
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return _together(found)


def _first_failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all to end well, and give None; or the number of one that didn't, for which the others would wait."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        codes = [process.poll() for process in processes]
        bad = next((number for number, code in enumerate(codes) if code), None)
        if bad is not None or None not in codes:
            return bad
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(_POLL_S)


def _together(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    joined: dict[str, float] = {}
    for name in found[0]:
        values = [each[name] for each in found]
        slowest = name.endswith("_s") and not name.endswith("per_second")
        joined[name] = max(values) if slowest else values[0] if name.startswith("device_") else sum(values)
    joined["host_link_bytes_per_second"] /= len(found)
    return joined


# -- one rank --------------------------------------------------------------------------------------------------------


def _rank(path: str) -> None:
    import torch
    import torch.distributed as dist

    from ds_train.engine.ranks import end, leave, meet, rank_info, settle

    info = rank_info()
    settle(info)
    meet(info)
    where: Any = "cpu" if info.device == "cpu" else f"{info.device}:{info.local_rank}"
    wait = _waiter(info.device)

    # A rank that shares its core is lucky now and then: the least of its times isn't what it gets.
    crowded = info.device == "cpu" and info.ranks > len(os.sched_getaffinity(0))
    typical = statistics.median if crowded else min

    def alone(work: Callable[[], Any]) -> float:
        """Seconds of one call over windows in which every rank works all the time, as they share cores."""
        work()
        seconds = []
        for _ in range(_ROUNDS):
            dist.barrier()
            wait()
            calls, started = 0, time.perf_counter()
            while time.perf_counter() - started < _WINDOW_S:
                work()
                wait()
                calls += 1
            seconds.append((time.perf_counter() - started) / calls)
        return typical(seconds)

    def together(work: Callable[[], Any], repeats: int) -> float:
        """Seconds of one call of a collective."""
        work()
        seconds = []
        for _ in range(_ROUNDS):
            dist.barrier()
            wait()
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            wait()
            seconds.append((time.perf_counter() - started) / repeats)
        return typical(seconds)

    figures: dict[str, float] = {}
    rows, inputs, outputs = _PRODUCT.get(info.device, _PRODUCT_ON_DEVICES)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        figures[f"flops_{name}"] = 2.0 * rows * inputs * outputs / alone(_product(rows, inputs, outputs, dtype, where))
    size = _TRAFFIC_BYTES.get(info.device, _TRAFFIC_ON_DEVICES)
    a = torch.rand(size // 4, device=where)
    # A gated activation forward and back keeps four tensors, each of which stands for four times its bytes
    # (plan/throughput.py); as many pairs of operands as don't stay in a cache.
    pairs = [[torch.rand(size // 4, device=where, requires_grad=True) for _ in range(2)] for _ in range(_PAIRS)]
    turn = itertools.cycle(pairs)

    def gate() -> None:
        gates, up = next(turn)
        gates.grad = up.grad = None
        torch.nn.functional.silu(gates).mul(up).backward(a)

    figures["memory_bytes_per_second"] = 4 * 4 * size / alone(gate)
    tiny = torch.ones(8, device=where, requires_grad=True)
    figures["kernel_s"] = alone(lambda: (tiny * 2).sum().backward()) / 4
    ranks = info.ranks
    large = torch.ones(_LARGE_MESSAGE.get(info.device, _LARGE_ON_DEVICES) // 4, device=where)
    small = torch.ones(_SMALL_MESSAGE // 4, device=where)
    figures["link_bytes_per_second"], figures["link_latency_s"] = 1e12, 0.0
    if ranks > 1:
        latency = together(lambda: dist.all_reduce(small), 20)
        seconds = together(lambda: dist.all_reduce(large), 3)
        carried = 2 * (ranks - 1) / ranks * large.nbytes
        figures["link_bytes_per_second"] = carried / max(1e-9, seconds - latency)
        # An all-reduce of n ranks takes several messages after one another (plan/throughput.py).
        steps = 2 * min(ranks - 1, (ranks - 1).bit_length() + 1)
        figures["link_latency_s"] = latency / steps
    host = torch.empty(size // 4)
    if info.device != "cpu":
        host = host.pin_memory()
    figures["host_link_bytes_per_second"] = size / alone(lambda: a.copy_(host))
    if info.device != "cpu":
        module: Any = getattr(torch, info.device)
        figures["device_memory_bytes"] = float(module.mem_get_info()[1])
    Path(path).write_text(json.dumps(figures))
    leave()
    end(0)


def _product(rows: int, inputs: int, outputs: int, dtype: Any, where: Any) -> Callable[[], Any]:
    """A layer's product as training computes it in `dtype`."""
    import torch

    from ds_train.models.cpu_products import fp32_products_are_faster

    hidden = torch.rand(rows, inputs, device=where).to(dtype)
    weight = torch.rand(outputs, inputs, device=where).to(dtype)
    if fp32_products_are_faster(where, dtype):
        return lambda: (hidden.float() @ weight.float().t()).to(dtype)
    return lambda: hidden @ weight.t()


def _waiter(device: Device) -> Callable[[], None]:
    import torch

    return (lambda: None) if device == "cpu" else torch.accelerator.synchronize


if __name__ == "__main__":
    _rank(sys.argv[1])
