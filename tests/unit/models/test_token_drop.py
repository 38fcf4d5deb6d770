"""Token dropping against layers that are shown the kept tokens alone, on decoders and encoders of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ds_train.models.token_drop import TokenDropping, dropping_difference, random_tokens, repeated_layers, take_tokens

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi", "olmo2", "bert", "roberta"]
LENGTH = 24


def build(family: str, **keys: Any) -> Any:
    known = AutoConfig.for_model(family).to_dict()
    dropout = {key: 0.0 for key, value in known.items() if isinstance(value, float) and "drop" in key}
    sizes = {key: value for key, value in SIZES.items() if key in known or key not in ("head_dim", "intermediate_size")}
    if family in ("phi", "gpt2", "bert", "roberta"):
        sizes["num_key_value_heads"] = 4
    special = {key: None for key in known if key.endswith("_token_id")} | {"pad_token_id": 0}
    config = AutoConfig.for_model(family, **(sizes | special | dropout | keys))
    config.use_cache = False
    torch.manual_seed(5)
    auto: Any = AutoModelForMaskedLM if family in ("bert", "roberta") else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa").train()


def batch_of(family: str) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 60, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]).expand(3, -1).contiguous()
    if family in ("bert", "roberta"):
        documents = (positions == 0).cumsum(1)
        return {"input_ids": tokens, "attention_mask": documents[:, None, :, None] == documents[:, None, None, :]}
    return {"input_ids": tokens, "position_ids": positions}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_tokens_are_as_if_hidden_from_the_layer(family: str) -> None:
    model, batch = build(family), batch_of(family)
    dropping = TokenDropping(model, seed=3, whole_layers=1)
    plain = model(**batch).logits
    dropping.kept = 10
    assert dropping_difference(model, dropping, batch) is None
    assert torch.equal(model(**batch).logits, plain), "nothing is dropped outside of a micro-batch"
    with dropping.of(torch.tensor([4, 5, 6])):
        dropped = model(**batch).logits
        assert not torch.allclose(dropped, plain, rtol=1e-2, atol=1e-2)
        model.eval()
        torch.testing.assert_close(model(**batch).logits, plain)  # evaluation uses all tokens
        model.train()
        dropping.kept = LENGTH
        assert torch.equal(model(**batch).logits, plain)


def test_layers_that_mix_tokens_by_other_means_are_noticed() -> None:
    model = build("llama")
    layer = repeated_layers(model)[1]
    plain = type(layer).forward

    class Shifting(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
            return plain(self, hidden_states + hidden_states.roll(1, 1), **others)

    layer.__class__ = Shifting
    dropping = TokenDropping(model, seed=3, whole_layers=1)
    dropping.kept = 10
    found = dropping_difference(model, dropping, batch_of("llama"))
    assert found == "its layers mix tokens otherwise than by attention"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_recomputed_layers_drop_what_they_dropped_first(family: str) -> None:
    batch = batch_of(family)
    gradients = []
    for recompute in (False, True):
        model = build(family)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        dropping = TokenDropping(model, seed=3, whole_layers=1)
        dropping.kept = 10
        losses = []
        for start in (0, 30):  # two micro-batches go forward before the first goes back
            with dropping.of(torch.arange(start, start + 3)):
                losses.append(model(**batch).logits.logsumexp(-1).sum() * (start + 1))
        for loss in losses:
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)


def test_tokens_are_uniform_and_follow_sample_and_layer() -> None:
    ids = torch.arange(4000) + (7 << 40)
    kept = random_tokens(ids, 3, 2, 20, 5)
    assert kept.shape == (4000, 5)
    assert bool((kept.diff(dim=1) > 0).all())
    counts = torch.bincount(kept.flatten(), minlength=20)
    assert counts.float().sub(1000).abs().max() < 5 * (1000 * 0.75) ** 0.5
    pairs = torch.zeros(20, 20)
    pairs.index_put_((kept[:, 0], kept[:, 1]), torch.ones(4000), accumulate=True)
    assert int((pairs > 0).sum()) > 100
    for other in (
        random_tokens(ids, 3, 1, 20, 5),
        random_tokens(ids, 4, 2, 20, 5),
        random_tokens(ids + 1, 3, 2, 20, 5),
    ):
        same = (other == kept).all(1).float().mean()
        assert same < 0.01
    assert torch.equal(random_tokens(ids[70:90], 3, 2, 20, 5), kept[70:90]), "whoever else is in the micro-batch"
    assert random_tokens(torch.tensor([5]), 1, 1, 8, 3).tolist() == GOLDEN


GOLDEN = [[0, 3, 7]]


def test_an_argument_that_nobody_knows_is_an_error() -> None:
    kept = torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match="its layers take alibi"):
        take_tokens("alibi", torch.zeros(4, 5), kept, 5)
    assert take_tokens("use_cache", False, kept, 5) is False
    assert take_tokens("cos", torch.zeros(1, 4), kept, 5).shape == (1, 4)
