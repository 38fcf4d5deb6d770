"""The packing check accepts families that keep documents apart and refuses those that don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM
from unit.models.test_loss import tiny

from ds_train.data.batches import documents_mask
from ds_train.errors import UserError
from ds_train.models.load import position_of_first
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


def encoder(family: str, attention: str | None = None, **keys: Any) -> Any:
    """A tiny encoder from scratch."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
        "sep_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **(sizes | keys))
    return AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(("family", "first"), [("bert", 0), ("roberta", 2), ("xlm-roberta", 2)])
def test_encoders_keep_documents_apart_by_a_mask(family: str, first: int) -> None:
    model = encoder(family)
    assert position_of_first(model.config) == first
    check_packing(model, 97, family, documents_mask=documents_mask, first_position=first)


def test_positions_that_count_from_another_one_are_refused() -> None:
    with pytest.raises(UserError, match="ignores restarting position ids or the mask"):
        check_packing(encoder("roberta"), 97, "roberta", documents_mask=documents_mask, first_position=0)


@pytest.mark.parametrize("family", ["modernbert", "fnet"])
def test_encoders_that_mix_tokens_beside_the_mask_are_refused(family: str) -> None:
    keys = {"local_attention": 6} if family == "modernbert" else {}
    with pytest.raises(UserError, match=r"rows of several documents.*packing: false"):
        check_packing(encoder(family, **keys), 97, family, documents_mask=documents_mask)


def test_attention_that_adds_its_mask_is_refused() -> None:
    model = encoder("bert", "eager")
    with pytest.raises(UserError, match="crosses from one document"):
        check_packing(model, 97, "bert", documents_mask=documents_mask)
