"""The passes that the fused optimizers take over from DeepSpeed give its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from ds_kernels import choose
from plain_loop import write_corpus, write_recipe, write_weights
from ranks import run_ranks

pytestmark = [pytest.mark.parity, pytest.mark.skipif(not choose().fused, reason=str(choose()))]

LAYOUTS = {
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2-cpu": {"zero_stage": 2, "offload_optimizer": "cpu", "pin_memory": False},
    "zero3-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu", "pin_memory": False},
    "pipeline": {"pipeline": 2},
}


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.exhaustive)])
def test_weights_and_states_have_the_bits_of_deepspeeds_own_passes(dtype: str, tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    recipes = [
        write_recipe(
            tmp_path, f"{name}-{dtype}", corpus, weights, "llama", layout, precision={"dtype": dtype},
            schedule={"steps": 4},
        )
        for name, layout in LAYOUTS.items()
    ]  # fmt: skip
    run_ranks(2, ["tests/parity/fused_passes.py", *map(str, recipes)], timeout_s=600).check()
