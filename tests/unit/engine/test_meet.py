"""What a rank has imported, and left as it was, when ranks have met."""

from __future__ import annotations

import subprocess
import sys

from ranks import ROOT, clean_environment

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
