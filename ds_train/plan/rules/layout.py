"""How ranks are cut: pipeline stages, tensor and sequence ranks."""

from __future__ import annotations

import math

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import (
    HEAD_COUNTS,
    PIPELINE,
    SEQUENCE,
    TENSOR,
    KeyRule,
    Predicate,
    Rule,
    above,
    all_of,
    any_of,
    at,
    divisors,
    given,
    is_not,
    size_of,
)

_CUT_BY_TENSOR = (*HEAD_COUNTS, "hidden_size", "intermediate_size")


def _degree_does_not_divide(degree: str, *sizes: str) -> Predicate:
    """The degree of parallelism doesn't divide a size of the model that is known."""

    def broken(facts: Facts) -> bool:
        known = [getattr(facts.size, size, None) for size in sizes]
        return any(size % facts.value(degree) for size in known if size)

    return broken


def _pipeline_ties_diverge(facts: Facts) -> bool:
    precision = facts.run.precision
    offload = facts.run.parallel.offload_optimizer != "none"
    scaled = precision.dtype == "fp16" or (precision.dtype == "bf16" and offload)
    tied = facts.size is None or facts.size.tied
    return PIPELINE(facts) and tied and scaled and precision.gradient_dtype == "fp32"


def _common_divisors(facts: Facts, sizes: tuple[str, ...]) -> str:
    return divisors(math.gcd(*(size_of(facts, name) or 0 for name in sizes)))


def _not_divided(facts: Facts, degree: int, sizes: tuple[str, ...]) -> str:
    """The sizes that `degree` doesn't divide, of those that are known."""
    known = {name: size_of(facts, name) for name in sizes}
    return " and ".join(f"{name}={size}" for name, size in known.items() if size and size % degree)


RULES: tuple[Rule | KeyRule, ...] = (
    # -- ranks ------------------------------------------------------------------------------------------------------
    Rule(
        "ranks", "parallel.ranks", lambda f: f.run.parallel.ranks not in ("auto", f.cluster.ranks),
        lambda f: f"the recipe is made for {f.run.parallel.ranks} ranks and {f.cluster.ranks} were started",
        lambda f: f"start {f.run.parallel.ranks} (--ranks; deepspeed: --num_accelerators), or set parallel.ranks=auto",
    ),
    Rule(
        "layout-divides", "parallel.pipeline x tensor x sequence", lambda f: f.cluster.ranks % f.fixed_ranks,
        lambda f: f"it doesn't divide the {f.cluster.ranks} ranks",
        lambda f: f"start a multiple of {f.fixed_ranks} ranks", lambda f: f.fixed_ranks,
    ),
    # -- pipeline, tensor, sequence ---------------------------------------------------------------------------------
    Rule(
        "pipeline-task", "parallel.pipeline", all_of(PIPELINE, is_not(at("task.kind", "causal-lm"))),
        lambda f: f"models of {f.run.task.kind} aren't cut into stages",
        "set parallel.pipeline=1; parallel.tensor or parallel.zero_stage=3 spread the model over ranks",
    ),
    Rule(
        "pipeline-plan", "parallel.pipeline",
        lambda f: PIPELINE(f) and f.run.task.kind == "causal-lm" and f.shares and not f.shares.can_cut_stages,
        lambda f: f"nothing says how models of family {f.arch} are cut into stages (plan/families.py)",
        "set parallel.pipeline=1; parallel.zero_stage=3 spreads any model over ranks",
    ),
    Rule(
        "tensor-plan", "parallel.tensor", lambda f: TENSOR(f) and f.shares and not f.shares.can_cut_tensors,
        lambda f: f"nothing says how matrices of family {f.arch} are shared (plan/families.py)",
        "set parallel.tensor=1; parallel.zero_stage=3 spreads any model over ranks",
    ),
    Rule(
        "pipeline-sequence", "parallel.sequence", all_of(PIPELINE, SEQUENCE),
        "DeepSpeed's pipelines know no sequence ranks (runtime/pipe/topology.py:234)",
        "set parallel.sequence=1, or parallel.pipeline=1",
    ),
    Rule(
        "cut-compile", "model.compile", all_of(at("model.compile", True), any_of(PIPELINE, TENSOR, SEQUENCE)),
        "layers that exchange tensors with other ranks aren't compiled", "set model.compile=false",
    ),
    Rule(
        "pipeline-zero", "parallel.zero_stage", all_of(PIPELINE, at("parallel.zero_stage", 2, 3)),
        "DeepSpeed's pipelines shard optimizer states only (pipe/engine.py:76)", "set parallel.zero_stage=1",
    ),
    Rule(
        "pipeline-overlap", "parallel.overlap_communication",
        all_of(PIPELINE, at("parallel.overlap_communication", True)),
        "DeepSpeed's pipelines reduce gradients after the last backward pass (engine.py:2661)", "set auto or false",
    ),
    Rule(
        "pipeline-layers", "parallel.pipeline",
        lambda f: f.size and f.size.num_hidden_layers and f.pipeline > f.size.num_hidden_layers,
        lambda f: f"the model has {size_of(f, 'num_hidden_layers')} layers",
        lambda f: f"at most {size_of(f, 'num_hidden_layers')}",
    ),
    Rule(
        "stage-layers-pipeline", "parallel.stage_layers", all_of(given("parallel.stage_layers"), is_not(PIPELINE)),
        "there is one stage only", "leave it out, or set parallel.pipeline above 1",
    ),
    Rule(
        "stage-layers-count", "parallel.stage_layers",
        lambda f: PIPELINE(f) and f.run.parallel.stage_layers is not None
        and len(f.run.parallel.stage_layers) != f.run.parallel.pipeline,
        lambda f: f"it doesn't have a number for each of the {f.run.parallel.pipeline} stages",
        lambda f: f"write {f.run.parallel.pipeline} numbers, or leave it out",
    ),
    Rule(
        "stage-layers-sum", "parallel.stage_layers",
        lambda f: f.run.parallel.stage_layers is not None and size_of(f, "num_hidden_layers")
        and sum(f.run.parallel.stage_layers) != size_of(f, "num_hidden_layers"),
        lambda f: f"the model has {size_of(f, 'num_hidden_layers')} layers",
        "let the numbers add up to that, or leave it out",
    ),
    Rule(
        "pipeline-tied", "precision.gradient_dtype", _pipeline_ties_diverge,
        "tied weights diverge between the stages of a pipeline (pipe/engine.py:283)",
        lambda f: f"set precision.gradient_dtype={f.run.precision.dtype}, or model.tie_word_embeddings=false",
    ),
    Rule(
        "tensor-sizes", "parallel.tensor", _degree_does_not_divide("parallel.tensor", *_CUT_BY_TENSOR),
        lambda f: f"it doesn't divide {_not_divided(f, f.tensor, _CUT_BY_TENSOR)}",
        lambda f: _common_divisors(f, _CUT_BY_TENSOR),
    ),
    Rule(
        "tensor-offload", "parallel.tensor",
        all_of(TENSOR, is_not(at("parallel.offload_params", "none"))),
        "parameters of tensor ranks aren't offloaded in this version", "set parallel.offload_params=none",
    ),
    Rule(
        "tensor-secondary", "parallel.secondary_partition",
        all_of(TENSOR, above("parallel.secondary_partition", 1)),
        "DeepSpeed takes neighbouring ranks for copies of one another (utils/groups.py:941), which tensor ranks aren't",
        "set parallel.secondary_partition=1, or parallel.tensor=1",
    ),
    Rule(
        "tensor-quantized-gradients", "parallel.quantized_gradients",
        all_of(TENSOR, at("parallel.quantized_gradients", True)),
        "between hosts DeepSpeed exchanges them over all ranks (stage3.py:1928), tensor ranks included",
        "set parallel.quantized_gradients=false, or parallel.tensor=1",
    ),
    Rule(
        "sequence-task", "parallel.sequence", all_of(SEQUENCE, is_not(at("task.kind", "causal-lm"))),
        lambda f: f"samples of {f.run.task.kind} aren't shared between ranks", "set parallel.sequence=1",
    ),
    Rule(
        "sequence-attention", "model.attention", all_of(SEQUENCE, is_not(at("model.attention", "auto", "sdpa"))),
        "tokens are exchanged around torch's scaled-dot-product attention", "set model.attention=sdpa",
    ),
    Rule(
        "sequence-heads", "parallel.sequence",
        lambda f: SEQUENCE(f) and any(
            (size_of(f, name) or 0) % (f.sequence * f.tensor) for name in HEAD_COUNTS
        ),
        lambda f: f"{'with the tensor ranks it' if TENSOR(f) else 'it'} doesn't divide "
        + _not_divided(f, f.sequence * f.tensor, HEAD_COUNTS),
        lambda f: f"{'tensor x sequence ' if TENSOR(f) else ''}{_common_divisors(f, HEAD_COUNTS)}",
    ),
    Rule(
        "sequence-length", "data.sequence_length",
        lambda f: f.run.data.sequence_length % f.sequence,
        lambda f: f"parallel.sequence={f.run.parallel.sequence} doesn't divide it (ulysses_sp.py:470)",
        lambda f: f"nearest: {-(-f.run.data.sequence_length // f.sequence) * f.sequence}",
    ),
)  # fmt: skip
