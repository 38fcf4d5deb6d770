"""The table of vocabularies against the prepared data and the arithmetic of the model that would be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ds_train.config import RunConfig
from ds_train.data.vocabularies import compare_vocabularies, flops_per_token
from ds_train.errors import UserError
from ds_train.track.flops import flops_per_token as flops_of_model


@pytest.fixture
def words(tmp_path: Path) -> Path:
    random = np.random.default_rng(3)
    (tmp_path / "text").mkdir()
    vocabulary = ["".join(random.choice(list("abcdefghij"), size=int(random.integers(2, 9)))) for _ in range(300)]
    for number in range(40):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(" ".join(random.choice(vocabulary, size=400)))
    return tmp_path


def test_larger_vocabularies_have_fewer_tokens_and_a_dearer_head(recipe: Callable[..., RunConfig], words: Path) -> None:
    rows = compare_vocabularies(recipe(), [600, 260, 400], 10**6)
    assert [row.size for row in rows] == [260, 400, 600]
    tokens = [row.tokens_per_byte for row in rows]
    assert 1.01 > tokens[0] > tokens[1] > tokens[2]
    for row in rows:
        assert row.flops_per_byte == pytest.approx(flops_per_token(recipe(), row.size)[1] * row.tokens_per_byte)  # type: ignore[operator]


@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_are_those_of_the_model(recipe: Callable[..., RunConfig], words: Path, tied: bool) -> None:
    sizes = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "tie_word_embeddings": tied,
    }  # fmt: skip
    run = recipe(model={"arch": "llama", **sizes}, data={"sequence_length": 128})
    config = AutoConfig.for_model("llama", vocab_size=1000, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and (tied or "embed_tokens" not in name)
    )
    parameters, flops = flops_per_token(run, 1000)
    assert parameters == pytest.approx(model.num_parameters(), rel=0.01)
    assert flops == pytest.approx(flops_of_model(config, matrices, 128), rel=0.01)


def test_what_cannot_be_compared_is_refused(recipe: Callable[..., RunConfig], words: Path) -> None:
    with pytest.raises(UserError, match="--sizes=100"):
        compare_vocabularies(recipe(), [100, 300], 10**6)
    with pytest.raises(UserError, match=r"model\.path"):
        compare_vocabularies(recipe(model={"path": "there"}), [300], 10**6)
