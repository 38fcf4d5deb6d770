"""Tensors of a rank on a CPU lie in huge pages, where the system gives any."""

import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
from pathlib import Path
from ds_train.engine.ranks import return_freed_memory
return_freed_memory()
import torch
tensor = torch.ones(16 * 2**20)
print(*(line.split()[1] for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHuge" in line))
"""


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system gives no huge pages by itself"
)
def test_large_tensors_lie_in_huge_pages() -> None:
    printed = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    assert int(printed) >= 32 * 1024  # KiB, half of the tensor
