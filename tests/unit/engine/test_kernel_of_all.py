"""Which kernel updates the parameters where hosts differ in what they have."""

from __future__ import annotations

import pytest
from ds_kernels import Choice
from torch import Tensor

from ds_train.config.optimizer import OptimizerSection
from ds_train.engine import build

OWN, TORCHS = Choice("cpu-avx2", "the widest"), Choice("torch-fused", "there is no g++ here")


@pytest.mark.parametrize(
    ("own", "others_without", "name"), [(OWN, 0, "cpu-avx2"), (OWN, 8, "torch-fused"), (TORCHS, 0, "torch-fused")]
)
def test_all_ranks_have_the_kernels_or_none_uses_them(
    own: Choice, others_without: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_sum(tensor: Tensor) -> Tensor:
        return tensor + others_without

    monkeypatch.setattr(build, "choose_kernel", lambda *_: own)
    monkeypatch.setattr(build, "all_sum", all_sum)
    found = build._everyones(OptimizerSection(), "cpu")
    assert found.name == name
    if others_without:
        assert found.reason == "8 ranks have no kernels"
