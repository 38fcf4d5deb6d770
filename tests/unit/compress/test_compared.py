"""Attention relations against their definition in float64, and who may see whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ds_train.compress import compared
from ds_train.compress.compared import check_relations, relation_loss, token_weights, visible_tokens
from ds_train.config.load import validate
from ds_train.errors import UserError
from ds_train.models.token_drop import repeated_layers


def states(heads: int, shared: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer with `shared` key/value heads."""
    return torch.randn(2, heads, 9, width), torch.randn(2, shared, 9, width), torch.randn(2, shared, 9, width)


def plain_relation(queries: Tensor, others: Tensor, visible: Tensor) -> Tensor:
    """Probabilities (T, T) of one sample and head, a token at a time."""
    rows = []
    for place, query in enumerate(queries):
        scores = torch.tensor(
            [float(query.detach() @ other.detach()) / queries.shape[-1] ** 0.5 for other in others]
        ).double()
        weights = scores.exp() * visible[place]
        rows.append(weights / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["attention", "query", "key", "value"])
def test_a_relation_is_what_tokens_make_of_each_other(kind: Any) -> None:
    torch.manual_seed(1)
    ours, theirs = states(4, 2, 6), states(4 if kind == "attention" else 6, 2, 8)
    batch = {"input_ids": torch.zeros(2, 9, dtype=torch.int64), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["attention_mask"][1, 6:] = 0
    visible, weights = visible_tokens(batch, True), torch.rand(2, 9)
    weights[1, 6:] = 0
    mine = compared._States(*(one.requires_grad_() for one in ours), None)
    other = compared._States(*theirs, None)
    heads = 4
    found = relation_loss(mine.pair(kind, heads), other.pair(kind, heads), visible, weights / heads)
    expected = 0.0
    for sample in range(2):
        for head in range(heads):
            p, q = (_head(kind, one, sample, head, visible[sample]) for one in (theirs, ours))
            apart = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0.0).sum(-1)
            expected += float((apart * weights[sample] / heads).sum())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def _head(kind: str, layer: tuple[Tensor, ...], sample: int, head: int, visible: Tensor) -> Tensor:
    if kind == "attention":
        shared = layer[0].shape[1] // layer[1].shape[1]
        return plain_relation(layer[0][sample, head].detach(), layer[1][sample, head // shared], visible)
    chosen = layer[("query", "key", "value").index(kind)][sample].detach()
    joined = torch.cat([*chosen], -1)
    each = joined.shape[-1] // 4
    part = joined[:, head * each : (head + 1) * each]
    return plain_relation(part, part, visible)


def test_the_gradient_of_relations() -> None:
    torch.manual_seed(2)
    one, other, their_one, their_other = (torch.randn(2, 3, 5, 4) for _ in range(4))
    visible, weights = torch.ones(2, 5, 5, dtype=torch.bool).tril(), torch.rand(2, 5)

    def plain(left: Tensor, right: Tensor) -> Tensor:
        q, p = (
            (pair[0] @ pair[1].transpose(2, 3)).masked_fill(~visible[:, None], -torch.inf).log_softmax(-1)
            for pair in ((left, right), (their_one.double(), their_other.double()))
        )
        apart = torch.where(visible[:, None], p.exp() * (p - q), 0.0)
        return (apart.sum(-1) * weights[:, None]).sum()

    inputs = [one.requires_grad_(), other.requires_grad_()]
    ours = torch.autograd.grad(2 * relation_loss((one, other), (their_one, their_other), visible, weights), inputs)
    wide = [one.detach().double().requires_grad_(), other.detach().double().requires_grad_()]
    for found, expected in zip(ours, torch.autograd.grad(2 * plain(*wide), wide), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_who_sees_whom_and_what_a_token_counts() -> None:
    batch = {
        "input_ids": torch.zeros(1, 5, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
        "labels": torch.tensor([[7, -100, 7, 7, -100]]),
    }  # fmt: skip
    rows = ["10000", "11000", "00100", "00110", "00111"]
    assert visible_tokens(batch, True).tolist() == [[[seen == "1" for seen in row] for row in rows]]
    assert token_weights(batch, None).tolist() == [[pytest.approx(3 / 5)] * 5]
    apart = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)[None, None]
    tokens = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": apart}
    assert torch.equal(visible_tokens(tokens, False), apart[:, 0])
    padded = {
        "input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 0]]),
        "labels": torch.tensor([2]),
    }  # fmt: skip
    assert visible_tokens(padded, False).tolist() == [[[True, True, False], [True, True, False], [True, True, True]]]
    assert token_weights(padded, None).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "qwen3", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_heard_whatever_function_computes_it(family: str, attention: str) -> None:
    torch.manual_seed(3)
    known = AutoConfig.for_model(family).to_dict()
    wanted = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "n_embd": 32,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{key: value for key, value in wanted.items() if key in known})
    auto: Any = AutoModel if family == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention).eval()
    heard: dict[int, Any] = {}
    compared._install()
    for number, layer in enumerate(repeated_layers(model)):
        compared._listen(layer, lambda one, number=number: heard.update({number: one}))
    tokens = torch.randint(0, 90, (2, 6))
    plain = auto.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    # Its own probabilities are the softmax of the products that were heard.
    model(input_ids=tokens)
    assert set(heard) == {0, 1}
    maps = plain(input_ids=tokens, output_attentions=True).attentions
    batch = {"input_ids": tokens}
    for number, expected in enumerate(maps):
        query, key = heard[number].pair("attention", 0)
        seen = visible_tokens(batch, family != "bert")[:, None]
        found = (query @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_family_whose_attention_is_not_heard_is_refused() -> None:
    run = validate({"model": {"arch": "bloom"}, "data": {"tokenizer": "bytes"}, "schedule": {"steps": 1}})
    config = AutoConfig.for_model("bloom")
    with pytest.raises(UserError, match="bloom: the attention of its layers can't be compared"):
        check_relations(run, config, "model")
    check_relations(run, AutoConfig.for_model("llama"), "model")
