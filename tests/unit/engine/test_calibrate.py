"""Figures of several ranks are put together as plans read them."""

from __future__ import annotations

import pytest

from ds_train.engine.calibrate import _together, default_counts
from ds_train.errors import UserError
from ds_train.plan.topology import known_device


def test_rates_add_up_and_latencies_are_the_slowest_ranks() -> None:
    ranks = [
        {"flops_fp32": 2.0, "link_latency_s": 0.1, "link_bytes_per_second": 5.0, "host_link_bytes_per_second": 4.0,
         "device_memory_bytes": 80.0, "kernel_s": 1.0},
        {"flops_fp32": 3.0, "link_latency_s": 0.3, "link_bytes_per_second": 7.0, "host_link_bytes_per_second": 6.0,
         "device_memory_bytes": 80.0, "kernel_s": 2.0},
    ]  # fmt: skip
    assert _together(ranks) == {
        "flops_fp32": 5.0, "link_latency_s": 0.3, "link_bytes_per_second": 12.0, "host_link_bytes_per_second": 5.0,
        "device_memory_bytes": 80.0, "kernel_s": 2.0,
    }  # fmt: skip


def test_a_cpu_is_measured_to_twice_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert default_counts("cpu") == [1, 2, 4, 8]
    assert known_device("cpu", "--device") == "cpu"
    with pytest.raises(UserError, match="--device=tpu"):
        known_device("tpu", "--device")
