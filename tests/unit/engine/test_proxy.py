"""The narrow stand-in of a model, on which a learning rate is searched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ds_train.config import RunConfig
from ds_train.data.tokenizer import byte_tokenizer
from ds_train.engine.lr_find import proxy, transfer
from ds_train.errors import UserError
from ds_train.models.load import load_model_config, outline
from ds_train.optim.build import parameter_groups

Recipe = Callable[..., RunConfig]
LLAMA = {
    "arch": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def test_a_proxy_has_the_same_heads_and_fewer_of_them(recipe: Recipe) -> None:
    run, ratio = proxy(recipe(model=LLAMA), 64)
    narrow = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert ratio == 4
    assert {key: run.model.config[key] for key in narrow} == narrow
    assert run.model.config["num_hidden_layers"] == 4
    gpt2, ratio = proxy(recipe(model={"arch": "gpt2", "n_embd": 96, "n_head": 6, "n_layer": 2}), 32)
    assert (gpt2.model.config["n_embd"], gpt2.model.config["n_head"], ratio) == (32, 2, 3)


def test_what_cannot_be_narrower_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="num_attention_heads=4 can't be made narrower as much"):
        proxy(recipe(model=LLAMA), 100)
    with pytest.raises(UserError, match="known for Adam"):
        proxy(recipe(model=LLAMA, optimizer={"kind": "sgd"}), 64)
    with pytest.raises(UserError, match="only a model from scratch"):
        proxy(recipe(model={"path": "somewhere"}), 64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rates_of_all_but_matrices_are_kept(recipe: Recipe, family: str) -> None:
    sizes = {"gpt2": {"n_embd": 96, "n_head": 6, "n_layer": 2}, "llama": LLAMA}
    task = {"kind": "masked-lm" if family == "bert" else "causal-lm"}
    run = recipe(model={"arch": family, **sizes.get(family, {"num_hidden_layers": 2})}, task=task)
    tokenizer = byte_tokenizer()
    factors = transfer(run, tokenizer, 4.0)["lr_factors"]
    model = outline(run, load_model_config(run, tokenizer))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    section = run.optimizer.model_copy(update={"lr_factors": factors})
    found = {
        names[id(parameter)]: group["lr_factor"]
        for group in parameter_groups(model, section)
        for parameter in group["params"]
    }
    assert len(found) == len(names)
    tables = ("wte", "wpe", "embed_tokens", "_embeddings")
    for name, parameter in model.named_parameters():
        kept = parameter.dim() < 2 or any(word in name for word in tables)
        assert found[name] == (4.0 if kept else 1.0), name
