"""What devices and links can do: a table with sources, and the figures that `ds-train calibrate` measured here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_train.plan.topology import Cluster, Device

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """Bytes per second that one rank sends while it receives as much, and seconds until a message arrives."""

    bytes_per_second: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """One kind of device in hosts of its kind.

    `flops` are peak FLOP/s of dense matrix products by dtype, `attainable` the share of them that large products
    reach; `memory_bytes` None where it depends on the host. `kernel_s` is the least time of an operation. `near` links
    ranks of a host, `far` ranks of different hosts, `host_link` a device and its host's memory. `host_bytes` is host
    memory per device, `nvme_bytes_per_second` a device's share of the local disks.
    """

    name: str
    device: Device
    memory_bytes: int | None
    flops: Mapping[str, float]
    attainable: float
    memory_bytes_per_second: float
    near: Link
    far: Link
    host_link: Link
    kernel_s: float = 4e-6
    host_bytes: int | None = None
    host_memory_bytes_per_second: float = 25e9
    nvme_bytes_per_second: float = 3e9
    source: str = ""
    measured: bool = False
    totals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Calibrated machines: figures of all ranks of the host together, by number of ranks."""

    def of_ranks(self, ranks_on_host: int) -> Hardware:
        """What one of `ranks_on_host` ranks has, where ranks share a host's cores, memory and links."""
        if not self.totals:
            return self
        measured = min(self.totals, key=lambda count: (abs(int(count) - ranks_on_host), int(count)))
        total, share = self.totals[measured], 1 / ranks_on_host
        return replace(
            self,
            flops={dtype: total[f"flops_{dtype}"] * share for dtype in self.flops},
            memory_bytes_per_second=total["memory_bytes_per_second"] * share,
            near=Link(total["link_bytes_per_second"] * share, total["link_latency_s"]),
            kernel_s=self.kernel_s * max(1.0, ranks_on_host / max(1, os.cpu_count() or 1)),
        )


def _device(
    name: str, gib: float, bf16: float, fp32: float, memory: float, near: float, source: str, *, pcie: float = 50e9,
    attainable: float = 0.70,
) -> Hardware:  # fmt: skip
    # 400 Gb/s of network per device, 256 GiB of host memory per device: an eight-device server of its time.
    return Hardware(
        name, "cuda", int(gib * GIB), {"bf16": bf16, "fp16": bf16, "fp32": fp32}, attainable, memory,
        Link(near, 6e-6), Link(45e9, 12e-6), Link(pcie, 10e-6), host_bytes=256 * GIB, source=source,
    )  # fmt: skip


# Peak of dense products: bf16 and fp16 on matrix units, fp32 as TF32. Links in bytes per second and direction.
TABLE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        replace(
            _device("A100-40GB", 40, 312e12, 156e12, 1.555e12, 250e9, "NVIDIA A100 data sheet, SXM4 40GB", pcie=25e9),
            far=Link(22e9, 12e-6),  # 200 Gb/s InfiniBand per device, as in DGX A100
        ),
        replace(
            _device("A100", 80, 312e12, 156e12, 2.039e12, 250e9, "NVIDIA A100 data sheet, SXM4 80GB", pcie=25e9),
            far=Link(22e9, 12e-6),
        ),
        _device("H100", 80, 989e12, 494e12, 3.35e12, 400e9, "NVIDIA H100 data sheet, SXM5", attainable=0.62),
        _device("H200", 141, 989e12, 494e12, 4.8e12, 400e9, "NVIDIA H200 data sheet, SXM", attainable=0.62),
        _device("B200", 180, 2250e12, 1125e12, 7.7e12, 800e9, "NVIDIA DGX B200 data sheet (per GPU)", attainable=0.62),
        _device("MI300X", 192, 1307e12, 654e12, 5.3e12, 380e9, "AMD Instinct MI300X data sheet", attainable=0.50),
        Hardware(
            "V100", "cuda", 32 * GIB, {"bf16": 15.7e12, "fp16": 125e12, "fp32": 15.7e12}, 0.62, 0.9e12,
            Link(120e9, 6e-6), Link(11e9, 15e-6), Link(12e9, 10e-6), host_bytes=96 * GIB,
            source="NVIDIA V100 data sheet, SXM3 32GB; DGX-2 network",
        ),
        Hardware(
            "CPU", "cpu", None, {"bf16": 60e9, "fp16": 60e9, "fp32": 60e9}, 1.0, 8e9,
            Link(1.5e9, 150e-6), Link(1e9, 200e-6), Link(8e9, 1e-6), kernel_s=8e-6,
            source="one core with AVX2 at 3 GHz; `ds-train calibrate` measures yours",
        ),
    )
}  # fmt: skip
"""Devices by the name that `--cluster 16x8:H100` takes."""


def calibration_path() -> Path:
    """Where `ds-train calibrate` stores its figures; DS_TRAIN_CALIBRATION names another file."""
    return Path(os.environ.get("DS_TRAIN_CALIBRATION") or "~/.cache/ds_train/calibration.json").expanduser()


def store_calibration(hardware: Hardware) -> Path:
    """Write measured figures for later plans on this machine."""
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(hardware), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_calibration() -> Hardware | None:
    """What `ds-train calibrate` stored on this machine; None where it hasn't, or in another version's form."""
    try:
        raw: dict[str, Any] = json.loads(calibration_path().read_text(encoding="utf-8"))
        return Hardware(**raw | {name: Link(**raw[name]) for name in ("near", "far", "host_link")})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def hardware_of(cluster: Cluster) -> Hardware | None:
    """The figures of a cluster's devices: calibrated ones for this machine's, else the table's; None if unknown."""
    if cluster.kind is None:  # like this machine
        measured = read_calibration()
        if measured is not None and measured.device == cluster.device:
            return _with_memory(measured, cluster)
    name = cluster.kind or ("CPU" if cluster.device == "cpu" else _device_here())
    found = TABLE.get(name) if name else None
    return _with_memory(found, cluster) if found is not None else None


def _with_memory(hardware: Hardware, cluster: Cluster) -> Hardware:
    """With the memory of this machine's ranks, where they are CPU ranks: they share the host's."""
    if hardware.device != "cpu" or cluster.kind is not None:
        return hardware
    import psutil

    return replace(hardware, memory_bytes=psutil.virtual_memory().total // cluster.ranks_per_host)


def _device_here() -> str | None:
    """Name in the table of this machine's first NVIDIA device, from its driver's files."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model")), "")
        if "A100" in model and "40GB" in model:
            return "A100-40GB"
        return next((name for name in TABLE if name in model), None)
    return None
