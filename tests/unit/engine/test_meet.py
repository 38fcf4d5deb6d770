"""What a rank has imported, and left as it was, when ranks have met."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ranks import ROOT, clean_environment

from ds_train.engine.ranks import RankInfo, _check_device
from ds_train.errors import UserError

MEET = """
import sys
import torch
from ds_train.engine.ranks import end, meet, rank_info
compiled = []
def compile_(function, **options):
    compiled.append(function)
    return lambda number: number + 1
torch.compile = compile_
meet(rank_info())
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
is_zero_supported_optimizer(torch.optim.SGD([torch.zeros(1)]))
assert torch.compile is compile_
assert not compiled
assert "torch._inductor.compile_fx" not in sys.modules
assert [zeropower_via_newtonschulz5(number) for number in (1, 2)] == [2, 3]
assert len(compiled) == 1
end(0)
"""


def test_the_compiler_is_not_imported_for_an_optimizer_that_is_not_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEET], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("devices", "cuda", "says"),
    [
        (0, None, r"DS_ACCELERATOR=cuda: torch .* is built without CUDA.*set cpu"),
        (0, "13.0", r"sees no device on .*nvidia-smi.*a driver as new as 13.0"),
        (2, "13.0", r"rank 11 is number 3 on .*, where torch sees 2 devices.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_device_that_torch_does_not_see_is_the_users_error(
    devices: int, cuda: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=says):
        _check_device(RankInfo(rank=11, ranks=16, local_rank=3, ranks_per_host=8, device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    _check_device(RankInfo(rank=11, ranks=16, local_rank=3, ranks_per_host=8, device="cuda"))
