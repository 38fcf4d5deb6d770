"""The packing check accepts families that keep documents apart and refuses those that don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.models.test_loss import tiny

from ds_train.errors import UserError
from ds_train.models.packing import check_packing


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "gemma2"])
def test_families_that_keep_documents_apart_pass(family: str) -> None:
    check_packing(tiny(family).eval(), 97, family)


def test_a_model_that_lets_documents_see_each_other_is_refused() -> None:
    model = tiny("llama").eval()

    def leaky(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        everything = torch.ones_like(input_ids)  # a 2D mask: plain causal attention over the whole window
        return model(input_ids=input_ids, attention_mask=everything)

    with pytest.raises(UserError, match="crosses from one document"):
        check_packing(leaky, 97, "llama")


def test_a_model_without_position_ids_is_refused() -> None:
    def positionless(input_ids: torch.Tensor) -> None:
        raise AssertionError("never called")

    with pytest.raises(UserError, match=r"takes no position ids.*packing: false"):
        check_packing(positionless, 97, "bloom")
