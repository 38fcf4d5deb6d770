"""Text, tokenizer and samples."""

from __future__ import annotations

from pathlib import Path

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import CLASSIFIER, CLASSIFYING, KeyRule, Rule, all_of, at, given, is_not


def _foreign_tokens(facts: Facts) -> bool:
    """Pretrained weights would see the tokens of another vocabulary, which nobody asked for by name."""
    data = facts.run.data
    another = data.train_vocabulary is not None or "tokenizer" not in data.model_fields_set
    return another and facts.own_tokenizer and not (facts.size and facts.size.vocab_size == facts.vocabulary)


def _tokenizer_missing(facts: Facts) -> bool:
    name = facts.run.data.tokenizer
    return facts.cluster.here and name.startswith((".", "/", "~")) and not Path(name).is_dir()


RULES: tuple[Rule | KeyRule, ...] = (
    Rule(
        "classification-source", "data.source", all_of(CLASSIFIER, at("data.source", "stdlib", "text")),
        "this source has no labels", "set data.source to tsv, jsonl, parquet or hub",
    ),
    Rule(
        "path-missing", "data.path", all_of(is_not(at("data.source", "stdlib")), is_not(given("data.path"))),
        lambda f: f"data.source={f.run.data.source} reads from a path",
        lambda f: "give a data set's hub id" if f.run.data.source == "hub" else "give a file, folder or glob",
    ),
    Rule(
        "path-stdlib", "data.path", all_of(at("data.source", "stdlib"), given("data.path")),
        "data.source=stdlib reads the running Python's own sources",
        "set data.source to text, jsonl, parquet, tsv or hub",
    ),
    Rule(
        "packing-by", "data.packing_by",
        lambda f: f.run.data.packing_by != "stream" and (not f.run.data.packing or f.run.task.kind == CLASSIFYING),
        "samples are padded, not packed", "leave it out; packing is for language models, with data.packing=true",
    ),
    Rule(
        "padding-free-packing", "data.padding_free", all_of(at("data.padding_free", True), at("data.packing", True)),
        "packed windows have nothing to lay end to end", "set data.packing=false",
    ),
    Rule(
        "padding-free-task", "data.padding_free", all_of(at("data.padding_free", True), CLASSIFIER),
        "a classifier's head looks at one text a row", "set data.padding_free=false",
    ),
    Rule(
        "streaming", "data.streaming", all_of(at("data.streaming", True), is_not(at("data.source", "hub"))),
        "only hub data sets are streamed", "set data.streaming=false: local files are never held in memory whole",
    ),
    Rule(
        "subset", "data.subset", all_of(given("data.subset"), is_not(at("data.source", "hub"))),
        "only hub data sets have subsets", "leave it out, or set data.source=hub",
    ),
    Rule(
        "split", "data.split", all_of(is_not(at("data.split", "train")), is_not(at("data.source", "hub"))),
        "only hub data sets have splits", "leave it out, or set data.source=hub",
    ),
    Rule(
        "validation-split", "data.validation_split",
        all_of(given("data.validation_split"), is_not(at("data.source", "hub"))),
        "only hub data sets have splits", "set data.validation_path, or data.validation_fraction",
    ),
    Rule(
        "validation-path", "data.validation_path",
        all_of(given("data.validation_path"), at("data.source", "stdlib", "hub")),
        lambda f: f"data.source={f.run.data.source} has no second path",
        "set data.validation_split (hub) or data.validation_fraction",
    ),
    Rule(
        "tokenizer-model", "data.tokenizer", all_of(at("data.tokenizer", "model"), is_not(given("model.path"))),
        "a model from scratch has no tokenizer beside it",
        "set bytes, a tokenizer's folder or hub id, or data.train_vocabulary",
    ),
    Rule(
        "tokenizer-missing", "data.tokenizer", _tokenizer_missing, "there is no such folder",
        "give a tokenizer's folder or hub id, bytes, or model for the one beside model.path",
    ),
    Rule(
        "tokenizer-trained", "data.train_vocabulary",
        all_of(given("data.train_vocabulary"), is_not(at("data.tokenizer", "bytes"))),
        "a tokenizer is either trained or loaded", "leave out data.tokenizer, or data.train_vocabulary",
    ),
    Rule(
        "tokenizer-pretrained", "data.tokenizer", _foreign_tokens,
        "pretrained weights know the tokens of their own tokenizer", "set data.tokenizer=model",
    ),
)  # fmt: skip
