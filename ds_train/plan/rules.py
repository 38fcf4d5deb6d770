"""Everything that can't be combined, as a table that is checked before any process does work.

A rule looks at the whole recipe and the cluster and names the key, the reason and the nearest thing that works.
Each comes from DeepSpeed's, torch's or transformers' source, or from a run that went wrong without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config.load import nearest
from ds_train.errors import Problem
from ds_train.plan.facts import Facts
from ds_train.plan.prune import problems, units_left
from ds_train.plan.topology import Layout, processor_has_fp16
from ds_train.plan.transformers_keys import TASKS, architectures_with_head, known_architectures

Predicate = Callable[[Facts], Any]
Text = str | Callable[[Facts], str]
KeyText = str | Callable[[Facts, str], str]


@dataclass(frozen=True)
class Rule:
    """`broken` says whether the recipe breaks the rule; `value` is shown where the recipe itself has none at `key`."""

    name: str
    key: str
    broken: Predicate
    reason: Text
    fix: Text
    value: Predicate | None = None

    def check(self, facts: Facts) -> list[Problem]:
        """The rule as a problem of this recipe, or nothing."""
        if not self.broken(facts):
            return []
        value = facts.value(self.key)
        if value is None and self.value is not None:
            value = self.value(facts)
        reason, fix = (text if isinstance(text, str) else text(facts) for text in (self.reason, self.fix))
        return [Problem(self.key, reason, fix) if value is None else Problem(self.key, reason, fix, value)]


@dataclass(frozen=True)
class KeyRule:
    """A rule about any number of recipe keys: `broken` gives those that break it, with their values."""

    name: str
    broken: Callable[[Facts], Mapping[str, Any]]
    reason: KeyText
    fix: KeyText

    def check(self, facts: Facts) -> list[Problem]:
        """One problem per key."""
        return [
            Problem(key, _of_key(self.reason, facts, key), _of_key(self.fix, facts, key), value)
            for key, value in self.broken(facts).items()
        ]


def check(facts: Facts) -> list[Problem]:
    """Every rule that the recipe breaks, in the order of the table."""
    return [problem for rule in RULES for problem in rule.check(facts)]


def _of_key(text: KeyText, facts: Facts, key: str) -> str:
    return text if isinstance(text, str) else text(facts, key)


# -- predicates ------------------------------------------------------------------------------------------------------


def _at(key: str, *values: Any) -> Predicate:
    """The recipe key has one of `values`."""
    return lambda facts: facts.value(key) in values


def _given(key: str) -> Predicate:
    """The recipe key is not None."""
    return lambda facts: facts.value(key) is not None


def _above_one(key: str) -> Predicate:
    return lambda facts: facts.value(key) > 1


def _all(*predicates: Predicate) -> Predicate:
    return lambda facts: all(predicate(facts) for predicate in predicates)


def _any(*predicates: Predicate) -> Predicate:
    return lambda facts: any(predicate(facts) for predicate in predicates)


def _not(predicate: Predicate) -> Predicate:
    return lambda facts: not predicate(facts)


def _device(*devices: str) -> Predicate:
    return lambda facts: facts.cluster.device in devices


_BELOW_3 = _at("parallel.zero_stage", 0, 1, 2)
_FLASH = _at("model.attention", "flash_attention_2", "flash_attention_3")
_CLASSIFYING = "sequence-classification"
_CLASSIFIER = _at("task.kind", _CLASSIFYING)
_PIPELINE = _above_one("parallel.pipeline")
_TENSOR = _above_one("parallel.tensor")
_SEQUENCE = _above_one("parallel.sequence")
_PATCHES = _above_one("patch.size")
_DROPPING = _not(_at("token_drop.kind", "none"))
_CURRICULUM = _not(_at("curriculum.kind", "none"))
_PRUNING: Predicate = lambda facts: facts.run.compress.prune.kinds  # noqa: E731
_HEADS = ("num_attention_heads", "num_key_value_heads")
_CUT_BY_TENSOR = (*_HEADS, "hidden_size", "intermediate_size")
# DeepSpeed's folders op_builder/{cpu,xpu,hpu} have no quantizer.
_NO_QUANTIZER = _device("cpu", "xpu", "hpu")


def _nvme(facts: Facts) -> bool:
    return "nvme" in (facts.run.parallel.offload_optimizer, facts.run.parallel.offload_params)


def _bad_nvme_path(facts: Facts) -> bool:
    path = facts.run.parallel.nvme_path
    return _nvme(facts) and (path is None or (facts.cluster.here and not Path(path).expanduser().is_dir()))


def _does_not_divide(part: str, whole: str) -> Predicate:
    """Both sizes of the model are known and one doesn't divide the other."""

    def broken(facts: Facts) -> bool:
        small, large = getattr(facts.size, part, None), getattr(facts.size, whole, None)
        return bool(small and large and large % small)

    return broken


def _degree_does_not_divide(degree: str, *sizes: str) -> Predicate:
    """The degree of parallelism doesn't divide a size of the model that is known."""

    def broken(facts: Facts) -> bool:
        known = [getattr(facts.size, size, None) for size in sizes]
        return any(size % facts.value(degree) for size in known if size)

    return broken


def _positions(facts: Facts) -> int | None:
    return facts.size.positions if facts.size else None


def _too_long(facts: Facts) -> bool:
    longest = _positions(facts)
    return longest is not None and facts.run.data.sequence_length > longest


def _longer_model(facts: Facts) -> str:
    shorter = f"set data.sequence_length to at most {_positions(facts)}"
    from_scratch = facts.run.model.arch is not None
    return f"{shorter}, or raise model.max_position_embeddings" if from_scratch else shorter


def _without_head(facts: Facts) -> bool:
    return facts.arch in known_architectures() and facts.arch not in architectures_with_head(facts.run.task.kind)


def _tasks_of(facts: Facts) -> str:
    tasks = [task for task in TASKS if facts.arch in architectures_with_head(task)]
    return f"{facts.arch} can learn {' or '.join(tasks)}" if tasks else "choose another family, llama or bert say"


def _similar_arch(facts: Facts) -> str:
    guess = nearest(str(facts.arch), list(known_architectures()))
    return f"did you mean {guess}?" if guess else "give a model_type of the installed transformers, llama or bert say"


def _vocabulary_too_small(facts: Facts) -> bool:
    size = facts.size.vocab_size if facts.size else None
    return size is not None and facts.vocabulary is not None and size < facts.vocabulary


def _foreign_tokens(facts: Facts) -> bool:
    """Pretrained weights would see the tokens of another vocabulary, which nobody asked for by name."""
    data = facts.run.data
    another = data.train_vocabulary is not None or "tokenizer" not in data.model_fields_set
    return another and facts.own_tokenizer and not (facts.size and facts.size.vocab_size == facts.vocabulary)


def _nothing_held_out(facts: Facts) -> bool:
    data = facts.run.data
    return data.validation_fraction == 0 and data.validation_path is None and data.validation_split is None


def _uneven_adagrad(facts: Facts) -> bool:
    optimizer = facts.run.optimizer
    return _torchs_adagrad(facts) and optimizer.weight_decay > 0 and not optimizer.decay_all


def _torchs_adagrad(facts: Facts) -> bool:
    return facts.run.optimizer.kind == "adagrad" and facts.run.optimizer.kernel != "fused"


_SCHEDULE_KEYS = {
    "decay_fraction": ("wsd",),
    "final_ratio": ("cosine", "linear", "cosine-restarts", "wsd", "polynomial", "one-cycle"),
    "power": ("polynomial",),
    "cycles": ("cosine-restarts",),
    "cycle_growth": ("cosine-restarts",),
    "cycle_peak": ("cosine-restarts",),
    "milestones": ("step",),
    "step_factor": ("step",),
}
"""Keys of `schedule` that only some kinds read."""


def _unread_schedule_keys(facts: Facts) -> dict[str, Any]:
    """Those that have another value than their default; a resolved recipe writes every default out."""
    schedule = facts.run.schedule
    fields = type(schedule).model_fields
    return {
        f"schedule.{key}": getattr(schedule, key)
        for key, kinds in _SCHEDULE_KEYS.items()
        if schedule.kind not in kinds and getattr(schedule, key) != fields[key].default
    }


def _between_ends(facts: Facts) -> float:
    """Share of the run between warm-up and cool-down."""
    return round(1 - facts.run.schedule.warmup_fraction - facts.run.schedule.cooldown_fraction, 9)


def _tokens_of_steps(facts: Facts) -> int:
    run = facts.run
    return (run.schedule.steps or 0) * run.batch.global_samples * run.data.sequence_length


def _bad_lengths(facts: Facts) -> dict[str, Any]:
    """Lengths of the curriculum that the window can't be cut into."""
    curriculum = facts.run.curriculum
    if curriculum.kind == "none":
        return {}
    if curriculum.kind == "discrete":
        wanted = {f"curriculum.lengths[{place}]": length for place, length in enumerate(curriculum.lengths)}
    else:
        wanted = {"curriculum.start_length": curriculum.start_length}
    return {key: length for key, length in wanted.items() if length not in _lengths_to_choose(facts)}


def _lengths_to_choose(facts: Facts) -> list[int]:
    """Lengths below the window's that schedule/timeline.py gives to samples."""
    curriculum, full = facts.run.curriculum, facts.run.data.sequence_length
    if curriculum.how == "repack" or curriculum.keep_tokens:
        return [length for length in range(8, full) if full % length == 0]
    return list(range(-(-8 // curriculum.multiple) * curriculum.multiple, full, curriculum.multiple))


def _after_cut(facts: Facts) -> Facts:
    """From the cut of a run that prunes on."""
    parallel = facts.run.compress.prune.parallel
    later = facts.run if parallel is None else facts.run.model_copy(update={"parallel": parallel})
    return Facts(later, facts.cluster)


def _pruning_problems(facts: Facts) -> dict[str, Problem]:
    """What is wrong with the sizes that pruning leaves, where the recipe alone says them."""
    section, size, after = facts.run.compress.prune, facts.size, _after_cut(facts)
    if size is None or section.parameters is not None or _auto_after_cut(facts):
        return {}
    known = {
        "heads": size.num_key_value_heads or size.num_attention_heads, "ffn": size.intermediate_size,
        "experts": size.num_experts, "hidden": size.hidden_size, "layers": size.num_hidden_layers,
    }  # fmt: skip
    sizes = {kind: count for kind, count in known.items() if count and kind in section.kinds}
    layout = Layout(after.pipeline, 1, after.sequence, after.tensor)
    left = units_left(section, sizes, "head_dim" not in facts.config_keys)
    return {problem.key: problem for problem in problems(section, sizes, left, layout)}


def _auto_after_cut(facts: Facts) -> bool:
    """Whether the layout from the cut on has degrees that a planner would have to choose."""
    parallel, keys = facts.run.compress.prune.parallel, ("pipeline", "tensor", "sequence", "zero_stage")
    offload = ("offload_optimizer", "offload_params")
    return parallel is not None and any(getattr(parallel, key) == "auto" for key in (*keys, *offload))


def _unpruned_proportions(facts: Facts) -> bool:
    section = facts.run.compress.prune
    return section.parameters is not None and not set(section.kinds) - {"layers"}


def _pipeline_ties_diverge(facts: Facts) -> bool:
    precision = facts.run.precision
    offload = facts.run.parallel.offload_optimizer != "none"
    scaled = precision.dtype == "fp16" or (precision.dtype == "bf16" and offload)
    tied = facts.size is None or facts.size.tied
    return _PIPELINE(facts) and tied and scaled and precision.gradient_dtype == "fp32"


def _divisors(number: int | None) -> str:
    return "one of " + ", ".join(str(value) for value in range(1, (number or 1) + 1) if (number or 1) % value == 0)


def _common_divisors(facts: Facts, sizes: tuple[str, ...]) -> str:
    return _divisors(math.gcd(*(_sizes(facts, name) or 0 for name in sizes)))


def _sizes_in_words(facts: Facts, sizes: tuple[str, ...]) -> str:
    """The sizes that the model's degree of parallelism must divide, those that are known."""
    return " and ".join(f"{name}={_sizes(facts, name)}" for name in sizes if _sizes(facts, name))


def _sizes(facts: Facts, name: str) -> Any:
    return getattr(facts.size, name, None)


# -- keys ------------------------------------------------------------------------------------------------------------

_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_OTHER_PLACES = {
    "dtype": "precision.dtype", "torch_dtype": "precision.dtype", "num_labels": "task.num_labels",
    "id2label": "task.num_labels", "label2id": "task.num_labels", "attn_implementation": "model.attention",
    "_attn_implementation": "model.attention", "gradient_checkpointing": "model.activation_checkpointing",
    "name_or_path": "model.path", "model_type": "model.arch",
}  # fmt: skip
_COUNTS = frozenset({
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "head_dim", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "ffn_dim",
})  # fmt: skip


def _model_keys(facts: Facts, wanted: Callable[[str, Any], bool]) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in facts.run.model.config.items() if wanted(key, value)}


def _unknown_model_keys(facts: Facts) -> dict[str, Any]:
    known = facts.config_keys
    return _model_keys(facts, lambda key, _: key not in known and key not in _OTHER_PLACES) if known else {}


def _misplaced_model_keys(facts: Facts) -> dict[str, Any]:
    return _model_keys(facts, lambda key, _: key in _OTHER_PLACES)


def _special_token_keys(facts: Facts) -> dict[str, Any]:
    return _model_keys(facts, lambda key, _: key in _SPECIAL_TOKENS) if facts.run.model.arch else {}


def _bad_counts(facts: Facts) -> dict[str, Any]:
    def bad(key: str, value: Any) -> bool:
        count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return key in _COUNTS and value is not None and not count

    return _model_keys(facts, bad)


def _similar_model_key(facts: Facts, key: str) -> str:
    word = key.removeprefix("model.")
    guess = nearest(word, [*facts.config_keys, *type(facts.run.model).model_fields])
    if guess:
        return f"did you mean `model.{guess}`?"
    return f"`ds-train` takes the keys of transformers' {known_architectures().get(str(facts.arch), 'config')}"


def _raw_zero(facts: Facts, wanted: Callable[[str], bool]) -> dict[str, Any]:
    section = facts.raw("zero_optimization")
    keys = section if isinstance(section, dict) else {}
    return {f"deepspeed.zero_optimization.{key}": value for key, value in keys.items() if wanted(key)}


def _ignored_by_stage(facts: Facts) -> dict[str, Any]:
    if facts.stage == 0:
        return _raw_zero(facts, lambda key: key != "stage")
    return _raw_zero(facts, lambda key: key.startswith("stage3_")) if facts.stage < 3 else {}


def _ignored_offload(facts: Facts) -> dict[str, Any]:
    parallel = facts.run.parallel
    device = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_params}
    return _raw_zero(facts, lambda key: device.get(key) == "none")


def _ignored_sections(facts: Facts) -> dict[str, Any]:
    """Raw sections about something that the recipe doesn't use."""
    dtype = facts.run.precision.dtype
    unused = {"aio": not _nvme(facts), "fp16": dtype != "fp16", "bf16": dtype != "bf16"}
    return {f"deepspeed.{key}": facts.raw(key) for key, off in unused.items() if off and facts.raw(key) is not None}


RULES: tuple[Rule | KeyRule, ...] = (
    # -- ranks ---------------------------------------------------------------------------------------------------
    Rule(
        "ranks", "parallel.ranks", lambda f: f.run.parallel.ranks not in ("auto", f.cluster.ranks),
        lambda f: f"the recipe is made for {f.run.parallel.ranks} ranks and {f.cluster.ranks} were started",
        lambda f: f"start {f.run.parallel.ranks} with --num_accelerators, or set parallel.ranks=auto",
    ),
    Rule(
        "layout-divides", "parallel.pipeline x tensor x sequence", lambda f: f.cluster.ranks % f.fixed_ranks,
        lambda f: f"it doesn't divide the {f.cluster.ranks} ranks",
        lambda f: f"start a multiple of {f.fixed_ranks} ranks", lambda f: f.fixed_ranks,
    ),
    # -- pipeline, tensor, sequence ------------------------------------------------------------------------------
    Rule(
        "pipeline-task", "parallel.pipeline", _all(_PIPELINE, _not(_at("task.kind", "causal-lm"))),
        lambda f: f"models of {f.run.task.kind} aren't cut into stages",
        "set parallel.pipeline=1; parallel.tensor or parallel.zero_stage=3 spread the model over ranks",
    ),
    Rule(
        "pipeline-sequence", "parallel.sequence", _all(_PIPELINE, _SEQUENCE),
        "DeepSpeed's pipelines know no sequence ranks (runtime/pipe/topology.py:234)",
        "set parallel.sequence=1, or parallel.pipeline=1",
    ),
    Rule(
        "cut-compile", "model.compile", _all(_at("model.compile", True), _any(_PIPELINE, _TENSOR, _SEQUENCE)),
        "layers that exchange tensors with other ranks aren't compiled", "set model.compile=false",
    ),
    Rule(
        "pipeline-zero", "parallel.zero_stage", _all(_PIPELINE, _at("parallel.zero_stage", 2, 3)),
        "DeepSpeed's pipelines shard optimizer states only (pipe/engine.py:76)", "set parallel.zero_stage=1",
    ),
    Rule(
        "pipeline-overlap", "parallel.overlap_communication",
        _all(_PIPELINE, _at("parallel.overlap_communication", True)),
        "DeepSpeed's pipelines reduce gradients after the last backward pass (engine.py:2661)", "set auto or false",
    ),
    Rule(
        "pipeline-layers", "parallel.pipeline",
        lambda f: f.size and f.size.num_hidden_layers and f.pipeline > f.size.num_hidden_layers,
        lambda f: f"the model has {_sizes(f, 'num_hidden_layers')} layers",
        lambda f: f"at most {_sizes(f, 'num_hidden_layers')}",
    ),
    Rule(
        "stage-layers-pipeline", "parallel.stage_layers", _all(_given("parallel.stage_layers"), _not(_PIPELINE)),
        "there is one stage only", "leave it out, or set parallel.pipeline above 1",
    ),
    Rule(
        "stage-layers-count", "parallel.stage_layers",
        lambda f: _PIPELINE(f) and f.run.parallel.stage_layers is not None
        and len(f.run.parallel.stage_layers) != f.run.parallel.pipeline,
        lambda f: f"it doesn't have a number for each of the {f.run.parallel.pipeline} stages",
        lambda f: f"write {f.run.parallel.pipeline} numbers, or leave it out",
    ),
    Rule(
        "stage-layers-sum", "parallel.stage_layers",
        lambda f: f.run.parallel.stage_layers is not None and _sizes(f, "num_hidden_layers")
        and sum(f.run.parallel.stage_layers) != _sizes(f, "num_hidden_layers"),
        lambda f: f"the model has {_sizes(f, 'num_hidden_layers')} layers",
        "let the numbers add up to that, or leave it out",
    ),
    Rule(
        "pipeline-tied", "precision.gradient_dtype", _pipeline_ties_diverge,
        "tied weights diverge between the stages of a pipeline (pipe/engine.py:283)",
        lambda f: f"set precision.gradient_dtype={f.run.precision.dtype}, or model.tie_word_embeddings=false",
    ),
    Rule(
        "tensor-sizes", "parallel.tensor", _degree_does_not_divide("parallel.tensor", *_CUT_BY_TENSOR),
        lambda f: f"it doesn't divide {_sizes_in_words(f, _CUT_BY_TENSOR)}",
        lambda f: _common_divisors(f, _CUT_BY_TENSOR),
    ),
    Rule(
        "tensor-offload", "parallel.tensor",
        _all(_TENSOR, _not(_at("parallel.offload_params", "none"))),
        "parameters of tensor ranks aren't offloaded in this version", "set parallel.offload_params=none",
    ),
    Rule(
        "tensor-secondary", "parallel.secondary_partition",
        _all(_TENSOR, _above_one("parallel.secondary_partition")),
        "DeepSpeed takes neighbouring ranks for copies of one another (utils/groups.py:941), which tensor ranks aren't",
        "set parallel.secondary_partition=1, or parallel.tensor=1",
    ),
    Rule(
        "tensor-quantized-gradients", "parallel.quantized_gradients",
        _all(_TENSOR, _at("parallel.quantized_gradients", True)),
        "between hosts DeepSpeed exchanges them over all ranks (stage3.py:1928), tensor ranks included",
        "set parallel.quantized_gradients=false, or parallel.tensor=1",
    ),
    Rule(
        "sequence-task", "parallel.sequence", _all(_SEQUENCE, _not(_at("task.kind", "causal-lm"))),
        lambda f: f"samples of {f.run.task.kind} aren't shared between ranks", "set parallel.sequence=1",
    ),
    Rule(
        "sequence-attention", "model.attention", _all(_SEQUENCE, _not(_at("model.attention", "auto", "sdpa"))),
        "tokens are exchanged around torch's scaled-dot-product attention", "set model.attention=sdpa",
    ),
    Rule(
        "sequence-heads", "parallel.sequence",
        lambda f: _SEQUENCE(f) and any(
            (_sizes(f, name) or 0) % (f.sequence * f.tensor) for name in _HEADS
        ),
        lambda f: f"{'with the tensor ranks it' if _TENSOR(f) else 'it'} doesn't divide {_sizes_in_words(f, _HEADS)}",
        lambda f: f"{'tensor x sequence ' if _TENSOR(f) else ''}{_common_divisors(f, _HEADS)}",
    ),
    Rule(
        "sequence-length", "data.sequence_length",
        lambda f: f.run.data.sequence_length % f.sequence,
        lambda f: f"parallel.sequence={f.run.parallel.sequence} doesn't divide it (ulysses_sp.py:470)",
        lambda f: f"nearest: {-(-f.run.data.sequence_length // f.sequence) * f.sequence}",
    ),
    # -- ZeRO, offload, ZeRO++ -----------------------------------------------------------------------------------
    Rule(
        "offload-stage", "parallel.offload_optimizer",
        _all(_not(_at("parallel.offload_optimizer", "none")), _at("parallel.zero_stage", 0)),
        "stage 0 keeps optimizer states on the device", "set parallel.zero_stage=1 or more",
    ),
    Rule(
        "offload-nvme-stage", "parallel.offload_optimizer", _all(_at("parallel.offload_optimizer", "nvme"), _BELOW_3),
        "only stage 3 swaps optimizer states to a disk", "set parallel.zero_stage=3, or offload_optimizer=cpu",
    ),
    Rule(
        "offload-params-stage", "parallel.offload_params", _all(_not(_at("parallel.offload_params", "none")), _BELOW_3),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or offload_params=none",
    ),
    Rule(
        "nvme-path", "parallel.nvme_path", _bad_nvme_path,
        "nvme offload needs an existing folder on a local disk", "set parallel.nvme_path to one",
    ),
    Rule(
        "nvme-device", "parallel.offload_optimizer", _all(_nvme, _device("hpu")),
        "DeepSpeed has no asynchronous file access on hpu (op_builder/hpu)", "offload to cpu",
    ),
    Rule(
        "nvme-optimizer", "optimizer.kind",
        _all(_at("parallel.offload_optimizer", "nvme"), _not(_at("optimizer.kind", "adam", "adamw"))),
        "the disk swapper is made for Adam's two moments", "set optimizer.kind=adamw, or offload_optimizer=cpu",
    ),
    Rule(
        "quantized-weights-stage", "parallel.quantized_weights",
        _all(_at("parallel.quantized_weights", True), _BELOW_3),
        "below stage 3 there is no all-gather of weights to quantize", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-gradients-stage", "parallel.quantized_gradients",
        _all(_at("parallel.quantized_gradients", True), _BELOW_3),
        "below stage 3 DeepSpeed accepts it and ignores it", "set parallel.zero_stage=3, or false",
    ),
    Rule(
        "quantized-weights-device", "parallel.quantized_weights",
        _all(_at("parallel.quantized_weights", True), _NO_QUANTIZER),
        lambda f: f"DeepSpeed has no quantizer for {f.cluster.device}", "set false; it is for CUDA and NPU devices",
    ),
    Rule(
        "quantized-gradients-device", "parallel.quantized_gradients",
        _all(_at("parallel.quantized_gradients", True), _NO_QUANTIZER),
        lambda f: f"DeepSpeed has no quantizer for {f.cluster.device}", "set false; it is for CUDA and NPU devices",
    ),
    Rule(
        "secondary-stage", "parallel.secondary_partition", _all(_above_one("parallel.secondary_partition"), _BELOW_3),
        "a second copy of the weights belongs to stage 3", "set parallel.zero_stage=3, or secondary_partition=1",
    ),
    Rule(
        "secondary-divides", "parallel.secondary_partition",
        lambda f: f.cluster.ranks % f.run.parallel.secondary_partition,
        lambda f: f"it doesn't divide the {f.cluster.ranks} ranks", lambda f: _divisors(f.cluster.ranks),
    ),
    Rule(
        "bucket", "parallel.bucket_elements",
        lambda f: isinstance(f.run.parallel.bucket_elements, int) and f.run.parallel.bucket_elements % 2,
        "ZeRO's buckets have an even number of elements (stage_1_and_2.py:389)",
        lambda f: f"auto, or {int(f.run.parallel.bucket_elements) + 1}",
    ),
    # -- precision -----------------------------------------------------------------------------------------------
    Rule(
        "fp16-cpu", "precision.dtype",
        lambda f: f.run.precision.dtype == "fp16" and f.cluster.device == "cpu" and f.cluster.here
        and not processor_has_fp16(),
        "this processor has no AVX512-FP16, and DeepSpeed refuses fp16 without it", "set precision.dtype=bf16",
    ),
    Rule(
        "gradient-dtype", "precision.gradient_dtype",
        lambda f: f.run.precision.gradient_dtype not in ("fp32", f.run.precision.dtype),
        lambda f: f"gradients of a {f.run.precision.dtype} model are accumulated in {f.run.precision.dtype} or fp32",
        "set precision.gradient_dtype=fp32",
    ),
    Rule(
        "loss-scale", "precision.loss_scale",
        _all(_not(_at("precision.loss_scale", "dynamic")), _not(_at("precision.dtype", "fp16"))),
        "only fp16 scales its loss", "leave it out, or set precision.dtype=fp16",
    ),
    # -- optimizer, schedule, tracking ---------------------------------------------------------------------------
    Rule(
        "adagrad-groups", "optimizer.weight_decay", _uneven_adagrad,
        "ZeRO rebuilds Adagrad with one group (stage_1_and_2.py:946), so norms and biases can't be left out of decay",
        "set optimizer.weight_decay=0, optimizer.decay_all=true, or optimizer.kernel=fused",
    ),
    Rule(
        "kernel-kind", "optimizer.kernel", _all(_at("optimizer.kernel", "fused"), _at("optimizer.kind", "sgd")),
        "there is no fused kernel for sgd", "set optimizer.kernel=auto",
    ),
    Rule(
        "kernel-device", "optimizer.kernel",
        _all(_at("optimizer.kernel", "fused"), _not(_device("cpu")), _at("parallel.offload_optimizer", "none")),
        "the fused kernels run where the optimizer's states are on the CPU",
        "set parallel.offload_optimizer=cpu, or optimizer.kernel=auto",
    ),
    Rule(
        "lr-factors", "optimizer.lr_factors",
        lambda f: f.run.optimizer.lr_factors and _torchs_adagrad(f),
        "ZeRO rebuilds torch's Adagrad with one group (stage_1_and_2.py:946)",
        "leave it out, or set optimizer.kernel=fused",
    ),
    Rule(
        "schedule-overlap", "schedule.cooldown_fraction",
        lambda f: _between_ends(f) < 0,
        lambda f: f"with warmup_fraction={f.run.schedule.warmup_fraction:g} it is longer than the run",
        lambda f: f"at most {1 - f.run.schedule.warmup_fraction:g}",
    ),
    Rule(
        "wsd-overlap", "schedule.decay_fraction",
        lambda f: f.run.schedule.kind == "wsd" and f.run.schedule.decay_fraction > _between_ends(f),
        lambda f: f"warm-up and cool-down leave {_between_ends(f):g} of the run to it",
        lambda f: f"at most {_between_ends(f):g}",
    ),
    Rule(
        "inverse-sqrt-warmup", "schedule.warmup_fraction",
        _all(_at("schedule.kind", "inverse-sqrt"), _at("schedule.warmup_fraction", 0.0)),
        "inverse-sqrt falls from the end of warm-up, and there is none", "set it above 0",
    ),
    KeyRule(
        "schedule-unread", _unread_schedule_keys, lambda f, _: f"schedule.kind={f.run.schedule.kind} doesn't read it",
        lambda _, key: f"leave it out, or set schedule.kind={_SCHEDULE_KEYS[key.removeprefix('schedule.')][0]}",
    ),
    Rule(
        "cooldown-unread", "schedule.cooldown_ratio",
        lambda f: f.run.schedule.cooldown_ratio > 0 and f.run.schedule.cooldown_fraction == 0,
        "there is no cool-down", "set schedule.cooldown_fraction above 0, or leave it out",
    ),
    # -- curriculum ----------------------------------------------------------------------------------------------
    Rule(
        "curriculum-task", "curriculum.kind", _all(_CURRICULUM, _CLASSIFIER),
        "a text that is cut short has another label, perhaps", "set curriculum.kind=none",
    ),
    Rule(
        "curriculum-repack", "curriculum.how",
        _all(_CURRICULUM, _at("curriculum.how", "repack"), _at("data.packing", False)),
        "only packed windows are cut into shorter ones", "set curriculum.how=truncate, or data.packing=true",
    ),
    KeyRule(
        "curriculum-length", _bad_lengths,
        lambda f, _: f"samples can't have that length beside data.sequence_length={f.run.data.sequence_length}",
        lambda f, _: "one of " + ", ".join(map(str, _lengths_to_choose(f))),
    ),
    Rule(
        "curriculum-steps", "schedule.steps",
        lambda f: _CURRICULUM(f) and not f.run.curriculum.keep_tokens and f.run.schedule.steps is not None,
        "steps differ in their tokens, so steps don't say how long the run is",
        lambda f: f"set schedule.tokens={_tokens_of_steps(f)}, or curriculum.keep_tokens=true",
    ),
    Rule(
        "curriculum-flash", "curriculum.keep_tokens",
        lambda f: _CURRICULUM(f) and _FLASH(f) and f.run.curriculum.keep_tokens and f.run.data.packing,
        "micro-batches have several packed windows then, and flash attention attends across their documents",
        "set curriculum.keep_tokens=false, or model.attention=sdpa",
    ),
    # -- patches -------------------------------------------------------------------------------------------------
    Rule(
        "patch-task", "patch.size", _all(_PATCHES, _not(_at("task.kind", "causal-lm"))),
        "a patch predicts the tokens of the next one, as causal language models do", "set patch.size=1",
    ),
    Rule(
        "patch-packing", "patch.size",
        _all(_PATCHES, _any(_at("data.packing", False), _not(_at("data.packing_by", "stream")))),
        "patches are cut from windows without padding", "set data.packing=true and data.packing_by=stream",
    ),
    Rule(
        "patch-divides", "patch.size",
        lambda f: f.run.data.sequence_length % (f.run.patch.size * f.sequence) and _PATCHES(f),
        lambda f: f"data.sequence_length={f.run.data.sequence_length} isn't a multiple of it"
        + (f" x parallel.sequence={f.run.parallel.sequence}" if _SEQUENCE(f) else ""),
        lambda f: _divisors(f.run.data.sequence_length // f.sequence),
    ),
    Rule(
        "patch-alone", "patch.size", _all(_PATCHES, _any(_CURRICULUM, _DROPPING)),
        "a run reduces its tokens in one way", "set curriculum.kind=none and token_drop.kind=none, or patch.size=1",
    ),
    # -- token dropping ------------------------------------------------------------------------------------------
    Rule(
        "token-drop-packing", "token_drop.kind",
        _all(_DROPPING, _any(_at("data.packing", False), _CLASSIFIER)),
        "rows as long as their micro-batch's longest text would drop other tokens in another layout",
        "set data.packing=true (language models), or token_drop.kind=none",
    ),
    Rule(
        "token-drop-sequence", "token_drop.kind", _all(_DROPPING, _SEQUENCE),
        "sequence ranks would be left with unequal numbers of tokens",
        "set parallel.sequence=1; parallel.tensor, parallel.pipeline and ZeRO go with it",
    ),
    Rule(
        "token-drop-compile", "model.compile", _all(_DROPPING, _at("model.compile", True)),
        "layers would be compiled again for every number of tokens", "set model.compile=false",
    ),
    Rule(
        "token-drop-attention", "model.attention",
        _all(_DROPPING, _any(_FLASH, _at("model.attention", "flex_attention"))),
        "its kernels know documents by positions that follow one another", "set model.attention=sdpa",
    ),
    Rule(
        "token-drop-layers", "token_drop.whole_layers",
        lambda f: _DROPPING(f) and _sizes(f, "num_hidden_layers")
        and 2 * f.run.token_drop.whole_layers >= _sizes(f, "num_hidden_layers"),
        lambda f: f"of the model's {_sizes(f, 'num_hidden_layers')} layers none is left to drop tokens",
        lambda f: f"at most {(_sizes(f, 'num_hidden_layers') - 1) // 2}, or token_drop.kind=none",
    ),
    # -- pruning -------------------------------------------------------------------------------------------------
    KeyRule(
        "prune-sizes", lambda f: {key: f.value(key) for key in _pruning_problems(f)},
        lambda f, key: _pruning_problems(f)[key].reason, lambda f, key: _pruning_problems(f)[key].fix,
    ),
    Rule(
        "prune-end", "compress.prune.end",
        lambda f: _PRUNING(f) and f.run.compress.prune.end < f.run.compress.prune.start,
        lambda f: f"it is before compress.prune.start={f.run.compress.prune.start}", "set it later, or start sooner",
    ),
    Rule(
        "prune-parameters", "compress.prune.parameters", _unpruned_proportions,
        "nothing says what goes", "give shares as proportions, such as compress.prune.ffn=0.5",
    ),
    Rule(
        "prune-compile", "model.compile", _all(_PRUNING, _at("model.compile", True)),
        "layers would be compiled again whenever a unit closes", "set model.compile=false",
    ),
    Rule(
        "prune-stages", "parallel.stage_layers",
        lambda f: f.run.compress.prune.layers and _after_cut(f).run.parallel.stage_layers is not None,
        "they are those of the model before its layers are pruned",
        "leave it out, or say those that stay in compress.prune.parallel.stage_layers",
    ),
    Rule(
        "prune-rates", "optimizer.lr_factors",
        lambda f: f.run.compress.prune.layers
        and any(character.isdigit() for pattern in f.run.optimizer.lr_factors for character in pattern),
        "layers have other numbers once some are pruned", "write * for the number of a layer",
    ),
    Rule(
        "prune-layout-auto", "compress.prune.parallel", _auto_after_cut,
        "the planner doesn't choose for a model that is smaller only later", "write its degrees as numbers",
    ),
    Rule(
        "sample-task", "track.sample_prompt", _all(_given("track.sample_prompt"), _not(_at("task.kind", "causal-lm"))),
        "only causal language models continue a text", "leave it out",
    ),
    Rule(
        "sample-export", "track.sample_prompt", _all(_given("track.sample_prompt"), _at("checkpoint.export", False)),
        "the sample is generated by the exported model", "set checkpoint.export=true, or leave it out",
    ),
    Rule(
        "push-export", "checkpoint.push_to", _all(_given("checkpoint.push_to"), _at("checkpoint.export", False)),
        "it is the export that is uploaded", "set checkpoint.export=true, or leave it out",
    ),
    Rule(
        "save-nvme", "checkpoint.asynchronous", _all(_at("checkpoint.asynchronous", True), _nvme),
        "the copy on the host would hold what nvme offload keeps out of its memory", "set checkpoint.asynchronous=auto",
    ),
    Rule(
        "noise-scale-layout", "track.noise_scale_every_steps",
        _all(_given("track.noise_scale_every_steps"), _any(_PIPELINE, _SEQUENCE)),
        "no rank sees the whole gradient of a micro-batch there", "leave it out, or use data and tensor ranks",
    ),
    Rule(
        "noise-scale-fp16", "track.noise_scale_every_steps",
        _all(_given("track.noise_scale_every_steps"), _at("precision.dtype", "fp16")),
        "gradients of scaled losses overflow now and then", "set precision.dtype=bf16, or leave it out",
    ),
    Rule(
        "eval-data", "track.eval_every_steps", _all(_given("track.eval_every_steps"), _nothing_held_out),
        "nothing is held out to evaluate on", "set data.validation_fraction above 0, or leave it out",
    ),
    # -- model and task ------------------------------------------------------------------------------------------
    Rule(
        "arch", "model.arch", lambda f: f.run.model.arch is not None and f.run.model.arch not in known_architectures(),
        "the installed transformers has no such family", _similar_arch,
    ),
    Rule(
        "weights", "model.path", lambda f: f.weights_missing,
        "there is no config.json in that folder", "give the folder that `save_pretrained` wrote, or a hub id",
    ),
    Rule(
        "head", "task.kind", _without_head,
        lambda f: f"transformers has no {f.run.task.kind} model of family {f.arch}", _tasks_of,
    ),
    KeyRule(
        "model-key", _unknown_model_keys,
        lambda f, _: f"the transformers config of {f.arch} has no such key", _similar_model_key,
    ),
    KeyRule(
        "model-key-elsewhere", _misplaced_model_keys, "another recipe key decides this",
        lambda _, key: f"set {_OTHER_PLACES[key.removeprefix('model.')]}",
    ),
    KeyRule(
        "special-tokens", _special_token_keys, "a model from scratch takes the tokenizer's special tokens",
        "leave it out",
    ),
    KeyRule("model-count", _bad_counts, "a size is a whole number above 0", "write one, without quotes"),
    Rule(
        "heads", "model.num_attention_heads",
        lambda f: f.size and f.size.head_dim is None and _does_not_divide("num_attention_heads", "hidden_size")(f),
        lambda f: f"it doesn't divide the hidden size {_sizes(f, 'hidden_size')}",
        lambda f: _divisors(_sizes(f, "hidden_size")), lambda f: _sizes(f, "num_attention_heads"),
    ),
    Rule(
        "head-groups", "model.num_key_value_heads", _does_not_divide("num_key_value_heads", "num_attention_heads"),
        lambda f: f"it doesn't divide the {_sizes(f, 'num_attention_heads')} attention heads",
        lambda f: _divisors(_sizes(f, "num_attention_heads")), lambda f: _sizes(f, "num_key_value_heads"),
    ),
    Rule(
        "positions", "data.sequence_length", _too_long, lambda f: f"the model has {_positions(f)} positions",
        _longer_model,
    ),
    Rule(
        "vocabulary", "model.vocab_size", _vocabulary_too_small,
        lambda f: f"vocabulary mismatch: the tokenizer has {f.vocabulary} tokens",
        lambda f: f"set model.vocab_size={f.vocabulary} or more",
        lambda f: _sizes(f, "vocab_size"),
    ),
    Rule(
        "attention-flash-device", "model.attention", _all(_FLASH, _device("cpu")),
        "flash attention is a kernel of GPUs", "set model.attention=sdpa",
    ),
    Rule(
        "attention-flash-dtype", "model.attention", _all(_FLASH, _at("precision.dtype", "fp32")),
        "flash attention computes in 16 bits only", "set precision.dtype=bf16, or model.attention=sdpa",
    ),
    Rule(
        "attention-flash-packing", "model.attention",
        lambda f: _FLASH(f) and f.run.data.packing and not _CLASSIFIER(f)
        and (f.run.batch.micro_samples != 1 or f.run.batch.eval_micro_samples not in (1, "auto")),
        "with more than one packed window at once it attends across documents "
        "(transformers' modeling_flash_attention_utils.py:574)",
        "set batch.micro_samples=1 and batch.eval_micro_samples=1, or model.attention=sdpa",
    ),
    Rule(
        "cut-flash", "model.attention", _all(_FLASH, _any(_PIPELINE, _TENSOR)),
        "a cut model can't be checked with it before training", "set model.attention=sdpa",
    ),
    Rule(
        "attention-flex-device", "model.attention", _all(_at("model.attention", "flex_attention"), _device("cpu")),
        "torch's flex attention has no backward pass on the CPU", "set model.attention=sdpa",
    ),
    Rule(
        "attention-family", "model.attention",
        _any(
            _all(_FLASH, lambda f: not f.supports("_supports_flash_attn")),
            _all(_at("model.attention", "sdpa"), lambda f: not f.supports("_supports_sdpa")),
            _all(_at("model.attention", "flex_attention"), lambda f: not f.supports("_supports_flex_attn")),
        ),
        lambda f: f"the models of family {f.arch} don't have it", "set model.attention=auto",
    ),
    Rule(
        "checkpointing-family", "model.activation_checkpointing",
        lambda f: f.run.model.activation_checkpointing and not f.supports("supports_gradient_checkpointing"),
        lambda f: f"the models of family {f.arch} don't support it", "set model.activation_checkpointing=false",
    ),
    # -- data ----------------------------------------------------------------------------------------------------
    Rule(
        "classification-source", "data.source", _all(_CLASSIFIER, _at("data.source", "stdlib", "text")),
        "this source has no labels", "use tsv, jsonl, parquet or hub",
    ),
    Rule(
        "path-missing", "data.path", _all(_not(_at("data.source", "stdlib")), _not(_given("data.path"))),
        lambda f: f"data.source={f.run.data.source} reads from a path",
        lambda f: "give a data set's hub id" if f.run.data.source == "hub" else "give a file, folder or glob",
    ),
    Rule(
        "path-stdlib", "data.path", _all(_at("data.source", "stdlib"), _given("data.path")),
        "data.source=stdlib reads the running Python's own sources",
        "set data.source to text, jsonl, parquet, tsv or hub",
    ),
    Rule(
        "packing-by", "data.packing_by",
        lambda f: f.run.data.packing_by != "stream" and (not f.run.data.packing or f.run.task.kind == _CLASSIFYING),
        "samples are padded, not packed", "leave it out; packing is for language models, with data.packing=true",
    ),
    Rule(
        "padding-free-packing", "data.padding_free", _all(_at("data.padding_free", True), _at("data.packing", True)),
        "packed windows have nothing to lay end to end", "set data.packing=false",
    ),
    Rule(
        "padding-free-task", "data.padding_free", _all(_at("data.padding_free", True), _CLASSIFIER),
        "a classifier's head looks at one text a row", "set data.padding_free=false",
    ),
    Rule(
        "streaming", "data.streaming", _all(_at("data.streaming", True), _not(_at("data.source", "hub"))),
        "only hub data sets are streamed", "set data.streaming=false: local files are never held in memory whole",
    ),
    Rule(
        "subset", "data.subset", _all(_given("data.subset"), _not(_at("data.source", "hub"))),
        "only hub data sets have subsets", "leave it out, or set data.source=hub",
    ),
    Rule(
        "split", "data.split", _all(_not(_at("data.split", "train")), _not(_at("data.source", "hub"))),
        "only hub data sets have splits", "leave it out, or set data.source=hub",
    ),
    Rule(
        "validation-split", "data.validation_split",
        _all(_given("data.validation_split"), _not(_at("data.source", "hub"))),
        "only hub data sets have splits", "set data.validation_path, or data.validation_fraction",
    ),
    Rule(
        "validation-path", "data.validation_path",
        _all(_given("data.validation_path"), _at("data.source", "stdlib", "hub")),
        lambda f: f"data.source={f.run.data.source} has no second path",
        "set data.validation_split (hub) or data.validation_fraction",
    ),
    Rule(
        "tokenizer-model", "data.tokenizer", _all(_at("data.tokenizer", "model"), _not(_given("model.path"))),
        "a model from scratch has no tokenizer beside it",
        "set bytes, a tokenizer's folder or hub id, or data.train_vocabulary",
    ),
    Rule(
        "tokenizer-trained", "data.train_vocabulary",
        _all(_given("data.train_vocabulary"), _not(_at("data.tokenizer", "bytes"))),
        "a tokenizer is either trained or loaded", "leave out data.tokenizer, or data.train_vocabulary",
    ),
    Rule(
        "tokenizer-pretrained", "data.tokenizer", _foreign_tokens,
        "pretrained weights know the tokens of their own tokenizer", "set data.tokenizer=model",
    ),
    # -- raw DeepSpeed keys; deepspeed_keys.py checks them one by one, these look at what else is set --------------
    KeyRule(
        "raw-stage", _ignored_by_stage, lambda f, _: f"DeepSpeed ignores it at stage {f.stage}",
        "leave it out, or raise parallel.zero_stage",
    ),
    KeyRule(
        "raw-offload", _ignored_offload, "nothing is offloaded there",
        "leave it out, or set parallel.offload_optimizer or parallel.offload_params",
    ),
    KeyRule(
        "raw-section", _ignored_sections, "the recipe doesn't use it, and DeepSpeed ignores it", "leave it out"
    ),
    Rule(
        "raw-communication", "deepspeed.communication_data_type",
        lambda f: f.raw("communication_data_type") not in (None, "fp32", "fp16", "bf16"),
        "DeepSpeed reduces gradients in fp32, fp16 or bf16", "write one of the three",
    ),
    Rule(
        "raw-gds", "deepspeed.aio.use_gds", lambda f: f.raw("aio.use_gds") is True and f.cluster.device != "cuda",
        "GPUDirect storage is for CUDA devices (aio_config.py:36)", "set false",
    ),
    Rule(
        "raw-quantized", "deepspeed.zero_optimization.zero_quantized_nontrainable_weights",
        lambda f: f.raw("zero_optimization.zero_quantized_nontrainable_weights") is True
        and (f.stage < 3 or _NO_QUANTIZER(f)),
        "it needs stage 3 and DeepSpeed's quantizer of CUDA and NPU devices", "leave it out",
    ),
)  # fmt: skip
"""The table. A row is (name, key, predicate, reason, fix, value shown where the recipe has none)."""
