"""Recipes: strict, every error at once, each with key, value, reason and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_train.config import dump, load, parse
from ds_train.config.load import known_keys
from ds_train.config.names import OTHER_NAMES
from ds_train.errors import Problem, UserError

MINIMAL = "model: {arch: llama}\nschedule: {steps: 10}\n"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(text, overrides)
    return str(caught.value).splitlines()


def test_numbers_overrides_and_free_model_keys() -> None:
    run = parse(
        "model: {arch: llama, hidden_size: 64}\nschedule: {steps: 10}\noptimizer: {lr: 3e-4}",
        ["model.n=1", "batch.micro_samples=4"],
    )
    assert run.optimizer.lr == 3e-4, "plain YAML would read this as text"
    assert run.model.config == {"hidden_size": 64, "n": 1}
    assert run.batch.micro_samples == 4


def test_a_dumped_recipe_reads_back_equal() -> None:
    run = parse(
        MINIMAL, ["model.hidden_size=64", "track.tags=[a,b]", "data.max_documents=5", "deepspeed.log_level=error"]
    )
    assert parse(dump(run)) == run


@pytest.mark.parametrize("text", ["${HOME}/x", "a \\${b} \\\\${c", "$ {} \\", "\n\t'\"${x.y}", "???", ""])
def test_a_dumped_text_is_no_interpolation(text: str) -> None:
    run = parse(MINIMAL)
    said = run.model_copy(update={"track": run.track.model_copy(update={"sample_prompt": text})})
    assert parse(dump(said)) == said


def test_places_that_libraries_are_handed_may_be_in_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run = parse(MINIMAL, ["data.path=~/corpus", "data.tokenizer=~/bpe", "parallel.nvme_path=~/fast"])
    assert (run.data.path, run.data.tokenizer) == ("/home/me/corpus", "/home/me/bpe")
    assert run.parallel.nvme_path == "/home/me/fast", "DeepSpeed would make a folder of the name ~"


def test_an_empty_section_means_its_defaults() -> None:
    assert parse(MINIMAL + "batch:\n") == parse(MINIMAL)


def test_every_error_comes_at_once_with_the_nearest_key() -> None:
    text = "model: {arch: llama}\nschedule: {steps: 1}\nbatch: {globl_samples: 3}\n"
    text += "optimiser: {}\nparallel: {zero_stage: 5}\ntrack: {micro_samples: 3}"
    lines = problems(text)
    assert len(lines) == 4
    assert "batch.globl_samples=3: section `batch` has no such key. Fix: did you mean `batch.global_samples`?" in lines
    assert "optimiser={}: the recipe has no such key. Fix: did you mean `optimizer`?" in lines
    assert "track.micro_samples=3: section `track` has no such key. Fix: did you mean `batch.micro_samples`?" in lines
    assert any(line.startswith("parallel.zero_stage=5: should be 0, 1, 2, 3 or 'auto'.") for line in lines)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batch.micro_samples=x", "batch.micro_samples=x: should be an integer or 'auto'. Fix: "),
        ("batch.micro_samples=0", "batch.micro_samples=0: should be at least 1 or 'auto'. Fix: "),
        ("parallel.ranks=0", "parallel.ranks=0: should be at least 1 or 'auto'. Fix: "),
        ("parallel.bucket_elements=1.5", "parallel.bucket_elements=1.5: should be an integer or 'auto'. Fix: "),
        ("track.peak_tflops=0", "track.peak_tflops=0: should be greater than 0 or 'auto'. Fix: "),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas[1]=1.0: should be less than 1. Fix: "),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: should be a list of 2. Fix: "),
        ("optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas=[0.9, 0.9, 0.9]: should be a list of 2. Fix: "),
        ("track.tags=a", "track.tags=a: should be a list. Fix: "),
        ("seed=2147483648", "seed=2147483648: should be less than 2147483648. Fix: "),
        ("data.packing=maybe", "data.packing=maybe: should be true or false. Fix: "),
        ("checkpoint.every_steps=None", "checkpoint.every_steps=None: should be an integer or null. Fix: write null."),
        ("checkpoint.resume=true", "checkpoint.resume=true: should be text. Fix: `ds-train schema checkpoint.resume`"),
        (
            "optimizer.kind=AdamW",
            "optimizer.kind=AdamW: should be 'adamw', 'adam', 'adagrad' or 'sgd'. Fix: did you mean",
        ),
        ("max_grad_norm=1", "max_grad_norm=1: the recipe has no such key. Fix: did you mean `optimizer.clip_norm`?"),
        ("name=123", 'name=123: should be text. Fix: write "123", quotes included.'),
        (
            "schedule.kind=cosin",
            "schedule.kind=cosin: should be 'constant', 'linear', 'cosine', 'cosine-restarts', ",
        ),
        ("batch=3", "batch=3: should be a mapping of keys. Fix: `ds-train schema batch` describes it."),
        ("model=null", "model: required and not given. Fix: give `model.path` (pretrained weights) or `model.arch`"),
        (
            "model={arch: llama, hidden_size: 64, config: {hidden_size: 32}}",
            "model: hidden_size is given twice: 64 here, 32 in config",
        ),
        ("model.config=3", "model.config=3: should be a mapping of keys. Fix: "),
        ("optimizer.lr=-1", "optimizer.lr=-1: should be greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan:"),
        (
            "compress.prune.head=0.5",
            "compress.prune.head=0.5: section `compress.prune` has no such key. Fix: did you mean",
        ),
        (
            "schedule.tokens=5",
            "schedule: exactly one of steps, tokens and epochs says how long the run is; given: steps, tokens",
        ),
        ("model.path=here", "model: exactly one of path and arch says which model is trained; given: both. Fix: "),
        ("name=a/b", "name=a/b:"),
        ("nonsense", "nonsense: an override is written key=value"),
        ("seed=${nowhere}", "seed: it doesn't fit together: Interpolation key 'nowhere' not found"),
        ("batch={a", "batch={a: the value is not valid YAML: "),
    ],
)
def test_one_line_per_mistake(override: str, expected: str) -> None:
    lines = problems(MINIMAL, override)
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_both_wrong_elements_of_a_list_are_named() -> None:
    assert [line.split(":")[0] for line in problems(MINIMAL, "optimizer.betas=[1.0,-1]")] == [
        "optimizer.betas[0]=1.0",
        "optimizer.betas[1]=-1",
    ]


def test_names_of_other_trainers_lead_to_keys_of_the_schema() -> None:
    assert set(OTHER_NAMES.values()) <= set(known_keys())
    roots = {key for key in known_keys() if "." not in key}
    assert not roots & set(OTHER_NAMES)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true"), (None, "null"), ("4", "'4'"), ("-1.5", "'-1.5'"), ("3e-4", "'3e-4'"), ("true", "'true'"),
        ("", "''"), ("a b", "'a b'"), (1e9, "1e+09"), (0.1, "0.1"), ([1, "x"], "[1, x]"),
        ({"a": {"b": False}}, "{a: {b: false}}"), ("auto", "auto"),
        ("x" * 200, "x" * 77 + "..."),
    ],
)  # fmt: skip
def test_values_are_shown_as_a_recipe_has_them(value: object, shown: str) -> None:
    assert str(Problem("key", "why", "", value)) == f"key={shown}: why."


def test_fixes_end_like_sentences_once() -> None:
    for line in problems(MINIMAL + "batch: {globl_samples: 3, micro_samples: x}\ncompress: {a: 1}\n1: 2"):
        assert line.endswith((".", "?"))
        assert not line.endswith(("?.", ".."))


@pytest.mark.parametrize("text", ["a: [", "- 1", "just words", ""])
def test_what_is_no_recipe(text: str) -> None:
    assert len(problems(text)) >= 1


def test_a_missing_recipe_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"no such recipe. Fix: did you mean .*quickstart\.yaml\?"):
        load(tmp_path / "quikstart.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read"):
        load(tmp_path / "binary.yaml")


def test_every_field_has_a_docstring() -> None:
    from ds_train.config.reference import reference

    rows = reference()
    shown = {row.key: (row.type, row.default) for row in rows}
    assert shown["optimizer.betas"] == ("list of 2 float", "[0.9, 0.95]")
    assert shown["data.max_documents"] == ("int | null", "null")
    assert shown["parallel.stage_layers"] == ("list of int | null", "null")
    assert shown["compress.prune.ffn"] == ("float | list of float | mapping", "0.0")
    assert shown["data.packing"] == ("bool", "true")
    assert [row.key for row in reference("precision")][:2] == ["precision", "precision.dtype"]
    assert not reference("prec")
    assert {row.key for row in rows} == set(known_keys())
    assert [row.key for row in rows if not row.text] == []
    assert [row.key for row in rows if row.type == ""] == []


def test_the_json_schema_accepts_recipes_and_describes_keys() -> None:
    from ds_train.config.reference import json_schema

    schema = json_schema()
    assert schema["$defs"]["ModelSection"]["additionalProperties"] is True
    assert schema["$defs"]["BatchSection"]["additionalProperties"] is False
    assert "ZeRO stage" in schema["$defs"]["ParallelSection"]["properties"]["zero_stage"]["description"]
    assert set(schema["required"]) == {"model", "schedule"}
