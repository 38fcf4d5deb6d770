"""Everything that can't be combined, as a table that is checked before any process does work.

A rule looks at the whole recipe and the cluster and names the key, the reason and the nearest thing that works.
Each comes from DeepSpeed's or transformers' source, or from a run that went wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.load import nearest
from ds_train.errors import Problem
from ds_train.plan.model_shape import ModelShape, read_local_config
from ds_train.plan.topology import Cluster
from ds_train.plan.transformers_keys import architectures, architectures_with_head, config_fields


@dataclass(frozen=True)
class Facts:
    """What a rule may look at."""

    run: RunConfig
    cluster: Cluster
    shape: ModelShape | None

    @property
    def arch(self) -> str | None:
        """The family: from the recipe, or from the config.json of a local folder; None for a hub id."""
        return self.shape.arch if self.shape is not None else self.run.model.arch


@dataclass(frozen=True)
class Rule:
    """`broken` says whether the recipe breaks the rule. `reason` and `fix` are texts, or functions of the facts."""

    name: str
    key: str
    broken: Callable[[Facts], Any]
    reason: str | Callable[[Facts], str]
    fix: str | Callable[[Facts], str]

    def problem(self, facts: Facts) -> Problem:
        """The rule as a problem of this recipe."""
        value: Any = facts.run
        for part in self.key.split("."):
            value = getattr(value, part, None) if not isinstance(value, dict) else value.get(part)
        return Problem(self.key, _text(self.reason, facts), _text(self.fix, facts), value)


def check(facts: Facts) -> list[Problem]:
    """Every rule that the recipe breaks, in the order of the table."""
    return [rule.problem(facts) for rule in RULES if rule.broken(facts)] + _unknown_model_keys(facts)


def _text(text: str | Callable[[Facts], str], facts: Facts) -> str:
    return text if isinstance(text, str) else text(facts)


def _unknown_model_keys(facts: Facts) -> list[Problem]:
    """Keys under `model` that neither the schema nor the family's config knows."""
    known = config_fields(facts.arch) if facts.arch else {}
    if not known:
        return []
    own = list(type(facts.run.model).model_fields)
    problems = []
    for key, value in facts.run.model.config.items():
        if key not in known:
            guess = nearest(key, [*known, *own])
            fix = f"did you mean `model.{guess}`?" if guess else f"its keys: {', '.join(sorted(known))}"
            problems.append(Problem(f"model.{key}", f"the config of {facts.arch} has no such key", fix, value))
    return problems


def _at(path: str, *values: Any) -> Callable[[Facts], bool]:
    """Predicate: the recipe key at `path` has one of `values`."""

    def holds(facts: Facts) -> bool:
        value: Any = facts.run
        for part in path.split("."):
            value = getattr(value, part)
        return value in values

    return holds


def _all(*predicates: Callable[[Facts], Any]) -> Callable[[Facts], bool]:
    return lambda facts: all(predicate(facts) for predicate in predicates)


def _is_not(predicate: Callable[[Facts], Any]) -> Callable[[Facts], bool]:
    return lambda facts: not predicate(facts)


_LOW_STAGE = _at("parallel.zero_stage", 0, 1, 2)
_ON_CPU: Callable[[Facts], bool] = lambda facts: facts.cluster.device == "cpu"  # noqa: E731
_LOCAL_SOURCE = _at("data.source", "text", "jsonl", "parquet", "tsv")


def _without_head(facts: Facts) -> bool:
    arch = facts.arch
    return arch in architectures() and arch not in architectures_with_head(facts.run.task.kind)


def _tasks_of(facts: Facts) -> str:
    tasks = [task for task in ("causal-lm", "masked-lm", "sequence-classification") if facts.arch in architectures_with_head(task)]
    return f"{facts.arch} can learn: {', '.join(tasks)}" if tasks else "choose another family"


def _similar_arch(facts: Facts) -> str:
    guess = nearest(str(facts.arch), list(architectures()))
    return f"did you mean {guess}?" if guess else "give a model_type of the installed transformers"


def _bad_nvme(facts: Facts) -> bool:
    parallel = facts.run.parallel
    wanted = "nvme" in (parallel.offload_optimizer, parallel.offload_params)
    return wanted and (parallel.nvme_path is None or not Path(parallel.nvme_path).expanduser().is_dir())


def _uneven_heads(facts: Facts) -> bool:
    shape = facts.shape
    if shape is None or shape.hidden_size is None or shape.num_attention_heads is None or shape.head_dim is not None:
        return False
    return shape.hidden_size % shape.num_attention_heads != 0


def _uneven_groups(facts: Facts) -> bool:
    shape = facts.shape
    if shape is None or not shape.num_attention_heads or not shape.num_key_value_heads:
        return False
    return shape.num_attention_heads % shape.num_key_value_heads != 0


def _too_long(facts: Facts) -> bool:
    longest = facts.shape.max_position_embeddings if facts.shape else None
    return longest is not None and facts.run.data.sequence_length > longest


def _positions(facts: Facts) -> int:
    return facts.shape.max_position_embeddings or 0 if facts.shape else 0


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)


def _wrong_ranks(facts: Facts) -> bool:
    return facts.run.parallel.ranks not in ("auto", facts.cluster.ranks)


def _missing_weights(facts: Facts) -> bool:
    path = facts.run.model.path
    if path is None:
        return False
    looks_local = path.startswith((".", "/", "~")) or Path(path).expanduser().is_dir()
    return looks_local and read_local_config(path) is None


RULES: tuple[Rule, ...] = (
    # -- ranks ---------------------------------------------------------------------------------------------------
    Rule(
        "ranks", "parallel.ranks", _wrong_ranks,
        lambda f: f"the recipe is made for {f.run.parallel.ranks} ranks and {f.cluster.ranks} were started",
        lambda f: f"start {f.run.parallel.ranks} with --num_accelerators, or set parallel.ranks=auto",
    ),
    Rule(
        "pipeline-zero", "parallel.zero_stage",
        lambda f: f.run.parallel.pipeline > 1 and f.run.parallel.zero_stage in (2, 3),
        "DeepSpeed's pipelines shard optimizer states only (pipe/engine.py:76)", "set parallel.zero_stage=1",
    ),
    Rule(
        "pipeline", "parallel.pipeline", lambda f: f.run.parallel.pipeline > 1,
        "pipeline parallelism is not available in this version",
        "set parallel.pipeline=1; parallel.zero_stage=3 spreads the model over ranks",
    ),
    Rule(
        "tensor", "parallel.tensor", lambda f: f.run.parallel.tensor > 1,
        "tensor parallelism is not available in this version",
        "set parallel.tensor=1; parallel.zero_stage=3 spreads the model over ranks",
    ),
    Rule(
        "sequence", "parallel.sequence", lambda f: f.run.parallel.sequence > 1,
        "sequence parallelism is not available in this version",
        "set parallel.sequence=1; model.activation_checkpointing=true saves memory on long samples",
    ),
    # -- ZeRO, offload, ZeRO++ -----------------------------------------------------------------------------------
    Rule(
        "offload-stage", "parallel.offload_optimizer",
        _all(_is_not(_at("parallel.offload_optimizer", "none")), _at("parallel.zero_stage", 0)),
        "stage 0 keeps optimizer states on the device", "set parallel.zero_stage=1 or more",
    ),
    Rule(
        "offload-nvme-stage", "parallel.offload_optimizer",
        _all(_at("parallel.offload_optimizer", "nvme"), _LOW_STAGE),
        "only stage 3 swaps optimizer states to a disk", "set parallel.zero_stage=3, or offload to cpu",
    ),
    Rule(
        "offload-params-stage", "parallel.offload_params",
        _all(_is_not(_at("parallel.offload_params", "none")), _LOW_STAGE),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or offload_params=none",
    ),
    Rule(
        "nvme-path", "parallel.nvme_path", _bad_nvme,
        "nvme offload needs an existing folder on a local disk", "set parallel.nvme_path to one",
    ),
    Rule(
        "quantized-weights-stage", "parallel.quantized_weights",
        _all(_at("parallel.quantized_weights", True), _LOW_STAGE),
        "there is no all-gather of weights to quantize below stage 3", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-gradients-stage", "parallel.quantized_gradients",
        _all(_at("parallel.quantized_gradients", True), _LOW_STAGE),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-device", "parallel.quantized_weights",
        _all(lambda f: f.run.parallel.quantized_weights or f.run.parallel.quantized_gradients, _ON_CPU),
        "ZeRO++'s quantizer is a CUDA kernel", "set quantized_weights and quantized_gradients to false on the CPU",
    ),
    Rule(
        "secondary-stage", "parallel.secondary_partition",
        _all(lambda f: f.run.parallel.secondary_partition > 1, _LOW_STAGE),
        "a second copy of the weights belongs to stage 3", "set parallel.zero_stage=3, or secondary_partition=1",
    ),
    Rule(
        "secondary-divides", "parallel.secondary_partition",
        lambda f: f.cluster.ranks % f.run.parallel.secondary_partition != 0,
        lambda f: f"it does not divide the {f.cluster.ranks} ranks", lambda f: f"one of {_divisors(f.cluster.ranks)}",
    ),
    Rule(
        "bucket-even", "parallel.bucket_elements",
        lambda f: isinstance(f.run.parallel.bucket_elements, int) and f.run.parallel.bucket_elements % 2 != 0,
        "ZeRO's all-gather bucket must be even (stage_1_and_2.py:389)", "add one",
    ),
    # -- precision -----------------------------------------------------------------------------------------------
    Rule(
        "fp16-cpu", "precision.dtype", _all(_at("precision.dtype", "fp16"), _ON_CPU),
        "DeepSpeed has no fp16 on the CPU", "set precision.dtype=bf16",
    ),
    Rule(
        "gradient-dtype", "precision.gradient_dtype",
        lambda f: f.run.precision.gradient_dtype not in ("fp32", f.run.precision.dtype),
        lambda f: f"gradients of a {f.run.precision.dtype} model are kept in it or in fp32",
        lambda f: f"set fp32 or {f.run.precision.dtype}",
    ),
    Rule(
        "loss-scale", "precision.loss_scale",
        _all(_is_not(_at("precision.loss_scale", "dynamic")), _is_not(_at("precision.dtype", "fp16"))),
        "only fp16 scales its loss", "leave it out, or set precision.dtype=fp16",
    ),
    # -- optimizer, schedule -------------------------------------------------------------------------------------
    Rule(
        "adagrad-groups", "optimizer.weight_decay",
        lambda f: f.run.optimizer.kind == "adagrad" and f.run.optimizer.weight_decay > 0 and not f.run.optimizer.decay_all,
        "ZeRO rebuilds Adagrad with one group (stage_1_and_2.py:946), so norms and biases can't be left out of decay",
        "set optimizer.weight_decay=0, or optimizer.decay_all=true",
    ),
    Rule(
        "offload-nvme-optimizer", "optimizer.kind",
        _all(_at("parallel.offload_optimizer", "nvme"), _is_not(_at("optimizer.kind", "adam", "adamw"))),
        "the disk swapper is made for Adam's two moments", "set adamw, or offload to cpu",
    ),
    Rule(
        "wsd-overlap", "schedule.decay_fraction",
        lambda f: f.run.schedule.kind == "wsd" and f.run.schedule.warmup_fraction + f.run.schedule.decay_fraction > 1,
        "warm-up and decay are longer than the run", lambda f: f"at most {1 - f.run.schedule.warmup_fraction:g}",
    ),
    # -- model and task ------------------------------------------------------------------------------------------
    Rule(
        "arch", "model.arch", lambda f: f.run.model.arch is not None and f.run.model.arch not in architectures(),
        "the installed transformers has no such family", _similar_arch,
    ),
    Rule(
        "weights", "model.path", _missing_weights,
        "there is no config.json in that folder", "give the folder that `save_pretrained` wrote, or a hub id",
    ),
    Rule(
        "head", "task.kind", _without_head,
        lambda f: f"transformers has no {f.run.task.kind} model of family {f.arch}", _tasks_of,
    ),
    Rule(
        "heads", "model.num_attention_heads", _uneven_heads,
        lambda f: f"it does not divide the hidden size {f.shape.hidden_size if f.shape else ''}",
        lambda f: f"one of {_divisors(f.shape.hidden_size or 1) if f.shape else ''}",
    ),
    Rule(
        "head-groups", "model.num_key_value_heads", _uneven_groups,
        lambda f: f"it does not divide the {f.shape.num_attention_heads if f.shape else ''} attention heads",
        lambda f: f"one of {_divisors(f.shape.num_attention_heads or 1) if f.shape else ''}",
    ),
    Rule(
        "positions", "data.sequence_length", _too_long,
        lambda f: f"the model has {_positions(f)} positions",
        lambda f: f"at most {_positions(f)}, or raise model.max_position_embeddings",
    ),
    Rule(
        "flash-cpu", "model.attention",
        _all(_at("model.attention", "flash_attention_2", "flash_attention_3"), _ON_CPU),
        "flash attention is a CUDA kernel", "set sdpa",
    ),
    # -- data ----------------------------------------------------------------------------------------------------
    Rule(
        "classification-packing", "data.packing",
        _all(_at("task.kind", "sequence-classification"), _at("data.packing", True)),
        "a classifier reads one text per sample", "set data.packing=false",
    ),
    Rule(
        "classification-source", "data.source",
        _all(_at("task.kind", "sequence-classification"), _at("data.source", "stdlib", "text")),
        "this source has no labels", "use tsv, jsonl, parquet or hub",
    ),
    Rule(
        "path-missing", "data.path",
        lambda f: f.run.data.source != "stdlib" and f.run.data.path is None,
        lambda f: f"source {f.run.data.source} reads from a path", "give a file, folder or glob; a hub id for hub",
    ),
    Rule(
        "path-stdlib", "data.path",
        lambda f: f.run.data.source == "stdlib" and f.run.data.path is not None,
        "source stdlib reads the running Python's own sources", "set data.source to text, jsonl, parquet, tsv or hub",
    ),
    Rule(
        "streaming", "data.streaming", _all(_at("data.streaming", True), _is_not(_at("data.source", "hub"))),
        "only hub data sets are streamed", "set data.streaming=false: local files are never held in memory whole",
    ),
    Rule(
        "validation-split", "data.validation_split",
        lambda f: f.run.data.validation_split is not None and f.run.data.source != "hub",
        "only hub data sets have splits", "set data.validation_path, or data.validation_fraction",
    ),
    Rule(
        "validation-path", "data.validation_path",
        lambda f: f.run.data.validation_path is not None and not _LOCAL_SOURCE(f),
        lambda f: f"source {f.run.data.source} has no second path", "set data.validation_split (hub) or validation_fraction",
    ),
    Rule(
        "tokenizer-model", "data.tokenizer", lambda f: f.run.data.tokenizer == "model" and f.run.model.path is None,
        "a model from scratch has no tokenizer beside it", "set bytes, a tokenizer's folder or hub id, or train_vocabulary",
    ),
    Rule(
        "tokenizer-trained", "data.train_vocabulary",
        lambda f: f.run.data.train_vocabulary is not None and f.run.data.tokenizer != "bytes",
        "a tokenizer is either trained or loaded", "leave out data.tokenizer, or data.train_vocabulary",
    ),
    Rule(
        "sample-task", "track.sample_prompt",
        lambda f: f.run.track.sample_prompt is not None and f.run.task.kind != "causal-lm",
        "only causal language models continue a text", "leave it out",
    ),
    Rule(
        "sample-export", "track.sample_prompt",
        lambda f: f.run.track.sample_prompt is not None and not f.run.checkpoint.export,
        "the sample is generated by the exported model", "set checkpoint.export=true, or leave out the prompt",
    ),
)  # fmt: skip
"""The table. A row is (name, key, predicate, reason, fix)."""


def names() -> Iterable[str]:
    """Names of all rules."""
    return [rule.name for rule in RULES]
