"""Another attention is one model's: neither the process's next model nor an export knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from unit.models.test_loss import tiny

from ds_train.models.attention import attend_by
from ds_train.models.cpu_products import use_fp32_products
from ds_train.parallel import sequence

IDS = torch.arange(26).view(2, 13)


def doubled(module: Any, *states: Any, **options: Any) -> Any:
    output, weights = sdpa_attention_forward(module, *states, **options)
    return 2 * output, weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("installed", ["before", "after", "never"])
def test_only_the_model_that_is_given_one_has_it(
    family: str, installed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    torch.manual_seed(0)
    one = tiny(family).eval() if family != "bert" else bert()
    one.save_pretrained(tmp_path / "weights")
    other = type(one).from_pretrained(tmp_path / "weights").eval()
    with torch.no_grad():
        before = other(IDS).logits
        if installed == "before":
            sequence._install()
        attend_by(one, doubled)
        if installed == "after":
            sequence._install()
        assert torch.equal(other(IDS).logits, before)
        assert not torch.allclose(one(IDS).logits, before)
    one.save_pretrained(tmp_path / "export")
    assert (tmp_path / "export" / "config.json").read_text() == (tmp_path / "weights" / "config.json").read_text()
    assert one.config._attn_implementation == "sdpa"


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def test_the_next_model_in_16_bits_computes_as_if_it_were_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path)
    first, following = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval() for _ in range(2))
    with torch.no_grad():
        before = first(IDS).logits
        use_fp32_products(first)
        assert torch.equal(following(IDS).logits, before)
