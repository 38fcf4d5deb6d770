"""The narrow stand-in of a model, on which a learning rate is searched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ds_train.config import RunConfig
from ds_train.engine.lr_find import proxy
from ds_train.errors import UserError

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
