"""How a micro-batch comes to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_train.models.tasks import on_device


def test_what_is_on_the_device_stays_as_it_is() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    assert on_device(batch, torch.device("cpu"))["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize(("lies", "goes", "pinned"), [("cpu", "cuda:1", True), ("cuda:1", "cuda:1", False)])
def test_a_gpu_copies_from_pinned_memory_and_nothing_waits(lies: str, goes: str, pinned: bool) -> None:
    calls: list[Any] = []

    class Stand:
        device = torch.device(lies)

        def pin_memory(self) -> Stand:
            calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Stand:
            calls.append((str(device), non_blocking))
            return self

    on_device({"labels": Stand()}, torch.device(goes))  # type: ignore[dict-item]
    assert calls == [*(["pinned"] if pinned else []), (goes, True)]
