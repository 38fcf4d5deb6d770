"""What a run that prunes will be from its cut on: sizes, memory and step time of the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.plan.facts import Facts
from ds_train.plan.make import RunPlan
from ds_train.plan.model_size import ALIASES, ModelSize, model_size, read_config, said_of_layers
from ds_train.plan.predict import Prediction, Predictor, chosen
from ds_train.plan.prune import Count, of_layer, shared_by, sizes_of, units_left
from ds_train.plan.transformers_keys import attribute_map

_NAMES = {
    "ffn": "intermediate_size", "experts": "num_experts", "hidden": "hidden_size", "layers": "num_hidden_layers",
}  # fmt: skip
_HALVINGS = 40


@dataclass(frozen=True)
class AfterCut:
    """A run from its cut on. `plan` is its layout there; `left` the units that stay, None where a time that is asked
    for decides, or the model's sizes aren't known here; `size` and `predicted` are the smaller model's."""

    plan: RunPlan
    left: Mapping[str, Count] | None
    size: ModelSize | None
    predicted: Prediction | None

    @property
    def share(self) -> float:
        """Share of the run after which it begins."""
        section = self.plan.run.compress.prune
        return max(section.start, section.end)

    @property
    def step_seconds(self) -> float | None:
        """Predicted time of a step."""
        return self.predicted.step.seconds if self.predicted and self.predicted.step else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "share": self.share,
            "left": self.left,
            "parameters": self.size.parameters if self.size else None,
            "predicted": self.predicted.to_dict() if self.predicted else None,
        }


def after_cut(plan: RunPlan) -> AfterCut | None:
    """What follows the cut by a run's plan for it (of the layout there); None for a run that doesn't prune."""
    run, section = plan.run, plan.run.compress.prune
    if not section.kinds:
        return None
    facts = Facts(run, plan.cluster)
    left = _left(facts, section, plan)
    if left is None:
        return AfterCut(plan, None, None, None)
    smaller = Facts(_smaller(facts, left), plan.cluster)
    predictor = Predictor.of(smaller)
    choice = chosen(run, plan.layout, plan.batch, plan.zero_stage)
    return AfterCut(plan, left, smaller.size, predictor.predict(choice) if predictor else None)


def _left(facts: Facts, section: PruneSection, plan: RunPlan) -> dict[str, Count] | None:
    """Units that stay, as far as arithmetic says it: the family's config may want the next larger number."""
    size = facts.size
    sizes = sizes_of(size, section) if size else {}
    if size is None or not sizes or section.latency is not None or section.latency_ms is not None:
        return None
    tied, layers = "head_dim" not in facts.config_keys, size.num_hidden_layers or 0
    if section.parameters is None:
        return units_left(section, sizes, tied, layers=layers)
    largest = max((section.share(kind) for kind in section.kinds if kind != "layers"), default=0.0)
    if not largest:
        return None

    def at(part: float) -> dict[str, Count]:
        return units_left(section, sizes, tied, part * (1 - 1e-6) / largest, shared_by(plan.layout), layers)

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        count = _size(facts, _smaller(facts, at(middle)))
        low, high = (low, middle) if count is not None and count <= section.parameters else (middle, high)
    return at(high)


def _size(facts: Facts, run: RunConfig) -> int | None:
    size = model_size(run.model, run.task.kind, facts.vocabulary)
    return size.parameters if size else None


def _smaller(facts: Facts, left: Mapping[str, Count]) -> RunConfig:
    """The recipe of a model with the units that stay."""
    size, model = facts.size, facts.run.model
    assert size is not None
    keys: dict[str, Any] = {}
    heads, groups = size.num_attention_heads, size.num_key_value_heads or size.num_attention_heads
    head = size.head_dim or (size.hidden_size // heads if size.hidden_size and heads else None)
    for kind, count in left.items():
        if kind == "heads" and heads and groups:
            keys |= {_key(facts, "num_attention_heads"): of_layer(count, 0) * heads // groups}
            keys |= {_key(facts, "num_key_value_heads"): of_layer(count, 0)} if size.num_key_value_heads else {}
        elif kind in _NAMES:
            keys[_key(facts, _NAMES[kind])] = count if isinstance(count, int) else list(count)
    if "head_dim" in facts.config_keys and ("heads" in left or "hidden" in left):
        keys["head_dim"] = head
    if "hidden" in left and "ffn" not in left:
        keys[_key(facts, "intermediate_size")] = size.intermediate_size or 4 * (size.hidden_size or 0)
    if "layers" in left and size.num_hidden_layers:
        said = (read_config(model.path, model.revision) or {} if model.path else {}) | model.config
        stay = range(of_layer(left["layers"], 0))
        keys = said_of_layers(said, size.num_hidden_layers, stay) | keys
    return facts.run.model_copy(update={"model": model.model_copy(update={"config": {**model.config, **keys}})})


def _key(facts: Facts, name: str) -> str:
    """The family's own name of a size."""
    names = (attribute_map(str(facts.arch)).get(name, name), *ALIASES[name])
    return next((alias for alias in names if alias in facts.config_keys), name)
