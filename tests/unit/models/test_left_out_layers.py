"""What a model without some of its layers computes, and that its mean is the whole model's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ds_train.compress.teacher import first_tensor
from ds_train.config.load import validate
from ds_train.errors import UserError
from ds_train.models.layer_drop import LayerDropping
from ds_train.models.token_drop import repeated_layers
from ds_train.parallel.check import check_layer_dropping
from ds_train.schedule.layer_drop import LayerDraw


def build(family: str) -> Any:
    torch.manual_seed(4)
    known = AutoConfig.for_model(family).to_dict()
    wanted = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 90,
        "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2,
        "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{key: value for key, value in wanted.items() if key in known})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().train()


def layer_outputs(layer: Any, hidden: Tensor, model: Any) -> Tensor:
    """What a layer of Llama's form gives, by its own code."""
    positions = torch.arange(hidden.shape[1])[None]
    mask = torch.full((hidden.shape[1],) * 2, -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, positions)
    output: Tensor = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return output


def test_a_layer_adds_more_where_it_may_be_left_out() -> None:
    model, plain = build("llama"), build("llama")
    tokens = torch.randint(0, 90, (2, 7))
    hidden = plain.model.embed_tokens(tokens)
    kept = (0.9, 0.6, 0.7)
    for number, layer in enumerate(plain.model.layers):
        if number != 1:
            hidden = hidden + (layer_outputs(layer, hidden, plain) - hidden) / kept[number]
    expected = plain.lm_head(plain.model.norm(hidden))
    LayerDropping(model).draw(LayerDraw(frozenset([1]), kept))
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-6, atol=1e-6)
    model.eval()
    torch.testing.assert_close(model(input_ids=tokens).logits, plain.eval()(input_ids=tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_mean_over_draws_of_the_last_layer_is_the_whole_model(family: str) -> None:
    model, plain = build(family), build(family)
    dropping = LayerDropping(model)
    seen: list[Tensor] = []
    whole: list[Tensor] = []
    for one, outputs in ((model, seen), (plain, whole)):
        repeated_layers(one)[-1].register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.append(first_tensor(output))
        )
    tokens = torch.randint(0, 90, (2, 7))
    plain(input_ids=tokens)
    kept = 0.3
    for dropped in (frozenset[int](), frozenset([2])):
        dropping.draw(LayerDraw(dropped, (1.0, 1.0, kept)))
        model(input_ids=tokens)
    mean = kept * seen[0] + (1 - kept) * seen[1]
    torch.testing.assert_close(mean, whole[0])


def test_every_layer_can_be_left_out() -> None:
    model = build("gpt2")
    dropping = LayerDropping(model)
    tokens = torch.randint(0, 90, (1, 5))
    found = []
    for dropped in itertools.chain.from_iterable(itertools.combinations(range(3), size) for size in range(4)):
        dropping.draw(LayerDraw(frozenset(dropped), (0.8, 0.7, 0.6)))
        found.append(model(input_ids=tokens).logits.sum().item())
    assert len(set(found)) == 8


def test_families_say_whether_their_layers_can_be_left_out() -> None:
    run = validate({
        "model": {"arch": "llama"}, "data": {"tokenizer": "bytes"}, "schedule": {"steps": 1},
        "layer_drop": {"kind": "progressive"},
    })  # fmt: skip
    for family in ("llama", "gpt2", "gemma2", "mixtral", "mamba"):
        check_layer_dropping(run, AutoConfig.for_model(family))
    # Its last layers take keys and values from earlier ones.
    with pytest.raises(UserError, match=r"layer_drop\.kind"):
        check_layer_dropping(run, AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=15))
