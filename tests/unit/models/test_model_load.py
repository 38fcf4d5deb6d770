"""Loading: seeded weights, vocabulary, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ds_train.checkpoint.hf import generate_sample
from ds_train.compress.teacher import check_teacher
from ds_train.config import RunConfig, dump, parse
from ds_train.data.tokenizer import load_tokenizer
from ds_train.errors import UserError
from ds_train.models.load import build_model, initialize_weights, keep_generation_config, load_model_config, outline
from ds_train.models.look_alike import small_run


def recipe(*overrides: str) -> RunConfig:
    return parse(
        "model: {arch: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4}\n"
        "precision: {dtype: fp32}\nschedule: {steps: 1}",
        overrides,
    )


def build(run: RunConfig) -> torch.nn.Module:
    return build_model(run, load_model_config(run, load_tokenizer(run)), {}, 0)


def test_weights_follow_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = build(recipe()).state_dict()
    torch.manual_seed(2)
    second = build(recipe()).state_dict()
    other = build(recipe("seed=2")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_module_has_the_same_weights_whatever_else_there_is() -> None:
    """Two layers of a three-layer model are those of a two-layer model: what a pipeline stage relies on."""
    three, two = build(recipe()).state_dict(), build(recipe("model.num_hidden_layers=2")).state_dict()
    assert all(torch.equal(three[name], weight) for name, weight in two.items())


def test_weights_have_the_distribution_of_the_family() -> None:
    state = build(recipe("model.initializer_range=0.05", "model.hidden_size=128")).state_dict()
    assert state["model.layers.1.mlp.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.05)
    assert (state["model.norm.weight"] == 1).all()
    layers = [state[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])


def test_initialisation_leaves_the_global_generator_alone() -> None:
    model = build(recipe())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialize_weights(model, 1)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)


def test_a_pretrained_folder_loads_and_its_new_head_follows_the_seed(tmp_path: Path) -> None:
    folder = str(tmp_path / "llama")
    source = build(recipe())
    source.save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(recipe()).save_pretrained(folder)
    run = parse(
        f"model: {{path: {folder}}}\ntask: {{kind: sequence-classification, num_labels: 5}}\n"
        "data: {source: tsv, path: x, packing: false, tokenizer: model}\nprecision: {dtype: fp32}\nschedule: {steps: 1}"
    )
    torch.manual_seed(1)
    first = build(run).state_dict()
    torch.manual_seed(2)
    second = build(run).state_dict()
    assert torch.equal(first["model.norm.weight"], source.state_dict()["model.norm.weight"])
    assert first["score.weight"].shape == (5, 32)
    assert torch.equal(first["score.weight"], second["score.weight"])


def test_a_pretrained_config_takes_the_recipes_keys_or_refuses_them(tmp_path: Path) -> None:
    build(recipe()).save_pretrained(tmp_path)  # type: ignore[operator]
    run = parse(f"model: {{path: {tmp_path}, rms_norm_eps: 0.5}}\nschedule: {{steps: 1}}")
    assert load_model_config(run, load_tokenizer(run)).rms_norm_eps == 0.5
    with pytest.raises(UserError, match=r"model.rope_theta=1e\+06: .* has no such key"):
        load_model_config(parse(dump(run), ["model.rope_theta=1e6"]), load_tokenizer(run))
    with pytest.raises(UserError, match="model: TypeError: Field 'hidden_size' expected int, got NoneType"):
        load_model_config(parse(dump(run), ["model.config.hidden_size=null"]), load_tokenizer(run))


def test_weights_that_do_not_fit_the_recipe_are_refused_by_name(tmp_path: Path) -> None:
    build(recipe()).save_pretrained(tmp_path)  # type: ignore[operator]
    text = f"model: {{path: {tmp_path}}}\nprecision: {{dtype: fp32}}\nschedule: {{steps: 1}}"
    with pytest.raises(UserError, match=r"model.path=.*: lm_head.weight is \(259, 32\) there and \(300, 32\) by"):
        build(parse(text, ["model.vocab_size=300"]))
    with pytest.raises(UserError, match=r"model.path=.*: there is nothing of model.layers.3 in its files"):
        build(parse(text, ["model.num_hidden_layers=5"]))
    # What only some of a layer's weights are is drawn, and known.
    biased = build(parse(text, ["model.attention_bias=true"]))
    assert len(biased.drawn_modules) == 12  # type: ignore[arg-type]
    assert biased.drawn_modules[0] == "model.layers.0.self_attn.k_proj"  # type: ignore[index]
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model.path=.*: no model can be loaded from there \(.*header"):
        build(parse(text))


def test_folders_may_be_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(recipe())
    source.save_pretrained(tmp_path / "llama")  # type: ignore[operator]
    load_tokenizer(recipe()).save_pretrained(tmp_path / "llama")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model: {path: ~/llama}\ndata: {tokenizer: model}\nprecision: {dtype: fp32}\nschedule: {steps: 1}"
    for overrides in ([], ["data.tokenizer=~/llama"]):
        found = build(parse(text, overrides)).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in source.state_dict().items())
    teacher = parse(text, ["compress.distill.teacher=~/llama", "compress.distill.logits=js"])
    config = load_model_config(teacher, load_tokenizer(teacher))
    assert check_teacher(teacher, config, load_tokenizer(teacher)).hidden_size == 32


def test_a_model_with_code_of_its_own_is_outlined_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    build(recipe()).save_pretrained(folder)  # type: ignore[operator]
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"model_type": "own", "auto_map": places}))
    run = parse(f"model: {{path: {folder}, trust_remote_code: true}}\nschedule: {{steps: 1}}")
    config = load_model_config(run, load_tokenizer(run))
    small_run(run, config, 2)
    assert type(outline(run, config)).__name__ == "OwnModel"
    load_tokenizer(run).save_pretrained(folder)
    assert generate_sample(folder, "ab", 2, trust_remote_code=True).startswith("ab")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.vocab_size=100",), r"model.vocab_size=100: vocabulary mismatch.*Fix: set model.vocab_size to 2\d\d"),
        (("model.num_attention_heads=5",), r"model: llama: .*hidden size \(32\)"),
        (("model.hidden_act=nope",), r"model"),
    ],
)
def test_what_the_family_refuses_is_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(recipe(*overrides))


def test_a_vocabulary_holds_the_largest_token_where_ids_have_gaps() -> None:
    words = Tokenizer(models.WordLevel({"?": 0, "a": 5, "</s>": 9}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")  # type: ignore[no-untyped-call]
    assert len(tokenizer) == 3
    config = load_model_config(recipe(), tokenizer)
    assert config.vocab_size == 10
    assert config.eos_token_id == 9
    expected = (
        "model.vocab_size=9: vocabulary mismatch: the tokenizer has 3 tokens, and the largest is number 9. Fix: set "
    )
    with pytest.raises(UserError, match=f"{expected}model.vocab_size to 10 or more"):
        load_model_config(recipe("model.vocab_size=9"), tokenizer)


def test_an_unreachable_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = parse("model: {path: nobody/no-such-model}\nschedule: {steps: 1}")
    with pytest.raises(
        UserError, match=r"model.path=nobody/no-such-model: no model can be loaded.*local folder"
    ) as caught:
        load_model_config(run, load_tokenizer(recipe()))
    assert len(str(caught.value).splitlines()) == 1


def test_a_sample_ends_where_the_models_positions_do(tmp_path: Path) -> None:
    run = parse("model: {arch: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 12}\nschedule: {steps: 1}")
    build(run).save_pretrained(tmp_path)  # type: ignore[operator]
    load_tokenizer(run).save_pretrained(tmp_path)
    assert generate_sample(tmp_path, "eight of", 64).startswith("eight of")
    assert generate_sample(tmp_path, "fourteen of it", 64).startswith("rteen of it")


def test_generation_settings_are_those_of_the_pretrained_model(tmp_path: Path) -> None:
    run = recipe()
    config = load_model_config(run, load_tokenizer(run))
    GenerationConfig(do_sample=True, top_k=7, eos_token_id=[2, 5]).save_pretrained(tmp_path)
    (tmp_path / "none").mkdir()
    for path, top_k in ((tmp_path, 7), (tmp_path / "none", None), (None, None)):
        model = outline(run, config)
        source = run.model_copy(update={"model": run.model.model_copy(update={"path": path and str(path)})})
        keep_generation_config(source, model)
        assert model.generation_config.top_k == top_k
