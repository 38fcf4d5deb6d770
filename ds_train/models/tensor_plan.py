"""What a family's tensor plan says about the modules of a model."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from ds_train.plan.families import EXPERT_STYLES, FAMILIES, TENSOR_STYLES


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """Style by module or parameter name (`*` for a layer's number), from the model itself or the table of families.

    Experts are left out: each rank holds them whole. Empty where the family has no plan.

    Raises:
        ValueError: a style that can't be run.
    """
    plan = dict(getattr(model, "_tp_plan", None) or {})
    family = FAMILIES.get(model.config.model_type)
    if not model.config.base_model_tp_plan and family is not None:
        prefix = "" if model.base_model is model else model.base_model_prefix + "."
        plan |= {prefix + name: style for name, style in family.tensor.items()}
    experts = {name for name, style in plan.items() if style in EXPERT_STYLES}
    expert_roots = {_before_experts(name) for name in experts}
    kept = {name: style for name, style in plan.items() if _before_experts(name) not in expert_roots - {None}}
    unknown = sorted(set(kept.values()) - TENSOR_STYLES - {"embedding_rowwise", "embedding_colwise"})
    if unknown:
        raise ValueError(f"its tensor plan has the style {unknown[0]}, which DeepSpeed's layers don't have")
    return kept


def general_name(name: str) -> str:
    """The name with `*` for every number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _before_experts(name: str) -> str | None:
    """The mixture's module that an entry of the plan belongs to, up to `experts`."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else None
