"""Ranks as a grid: how many there are, and where each one stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from ds_train.errors import user_error

Device = Literal["cpu", "cuda", "xpu", "hpu", "npu"]


def known_device(name: str, key: str) -> Device:
    """`name` as a kind of device.

    Raises:
        UserError: about `key`: there is no such kind.
    """
    if name not in get_args(Device):
        raise user_error(key, "no such device", f"one of {', '.join(get_args(Device))}", name)
    return cast(Device, name)


def device_here() -> Device:
    """The kind of device that ranks of this machine use where nobody says it. Imports no torch."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@dataclass(frozen=True)
class Cluster:
    """The ranks that a launch starts: their number, how many share a host, and the kind of device.

    `here` says that this machine is one of the hosts, so that folders and the processor can be looked up on it;
    False plans for machines that are only imagined. `kind` names the device in plan/hardware.py's table.
    """

    ranks: int
    ranks_per_host: int
    device: Device
    here: bool = True
    kind: str | None = None


class Coordinates(NamedTuple):
    """A rank's place on each axis, counted from 0."""

    pipe: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Neighbouring ranks differ in tensor first, then sequence, data, pipe."""

    pipe: int
    data: int
    sequence: int
    tensor: int

    @property
    def ranks(self) -> int:
        """Ranks of the whole grid."""
        return self.pipe * self.data * self.sequence * self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank` (0 to ranks - 1) in the grid."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is outside of a layout of {self.ranks} ranks")
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        pipe, data = divmod(rest, self.data)
        return Coordinates(pipe, data, sequence, tensor)

    def rank(self, place: Coordinates) -> int:
        """Rank at a place in the grid: the inverse of `coordinates`."""
        return ((place.pipe * self.data + place.data) * self.sequence + place.sequence) * self.tensor + place.tensor


@cache
def processor_has_fp16() -> bool:
    """Whether this machine's processor computes in fp16, as torch's CPU kernels and DeepSpeed ask for (AVX512-FP16)."""
    try:
        return "avx512_fp16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
