"""The noise scale that is named at the end of a run is that of the model which the run ends with."""

from __future__ import annotations

from typing import Any

import pytest

from ds_train.engine.noise import noise_scale, steps_of_this_model


def measured(step: int, noise: float, signal: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "gradient_noise": noise, "gradient_signal": signal}


def test_the_scale_is_the_ratio_of_the_means() -> None:
    assert noise_scale([measured(1, 6.0, 1.0), {"kind": "train", "step": 2}, measured(3, 2.0, 3.0)]) == 2.0
    assert noise_scale([measured(1, 6.0, -1.0)]) is None
    assert noise_scale([]) is None


@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_a_cut_begins_anew(cuts: int) -> None:
    """A run that is started again between a cut and the next checkpoint cuts again."""
    before, after = [measured(2, 900.0, 1.0), measured(4, 900.0, 1.0)], measured(6, 8.0, 2.0)
    between = [{"kind": "eval", "step": 4}, *cuts * [{"kind": "cut", "step": 4}], {"kind": "eval", "step": 4}]
    steps = steps_of_this_model([*before, *between, after])
    assert steps == ([after] if cuts else [*before, after])
