"""What a row of the tables is, and the predicates that several tables use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_train.errors import Problem
from ds_train.plan.facts import Facts

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


def _of_key(text: KeyText, facts: Facts, key: str) -> str:
    return text if isinstance(text, str) else text(facts, key)


def at(key: str, *values: Any) -> Predicate:
    """The recipe key has one of `values`."""
    return lambda facts: facts.value(key) in values


def given(key: str) -> Predicate:
    """The recipe key is not None."""
    return lambda facts: facts.value(key) is not None


def above(key: str, least: float = 0.0) -> Predicate:
    """The recipe key is a number above `least`."""
    return lambda facts: facts.value(key) > least


def all_of(*predicates: Predicate) -> Predicate:
    """Each of `predicates` holds."""
    return lambda facts: all(predicate(facts) for predicate in predicates)


def any_of(*predicates: Predicate) -> Predicate:
    """At least one of `predicates` holds."""
    return lambda facts: any(predicate(facts) for predicate in predicates)


def is_not(predicate: Predicate) -> Predicate:
    """`predicate` doesn't hold."""
    return lambda facts: not predicate(facts)


def on_device(*devices: str) -> Predicate:
    """The ranks run on one of `devices`."""
    return lambda facts: facts.cluster.device in devices


def held_out(facts: Facts) -> bool:
    """Whether there is something to evaluate on."""
    return facts.run.data.holds_out


def taught(facts: Facts) -> bool:
    """Whether there is a teacher."""
    return facts.run.compress.distill.active


def prunes(facts: Facts) -> bool:
    """Whether units go."""
    return bool(facts.run.compress.prune.kinds)


def nvme(facts: Facts) -> bool:
    """Whether something is offloaded to a disk."""
    return facts.run.parallel.on_disk


def size_of(facts: Facts, name: str) -> Any:
    """One of the model's sizes; None where it isn't known."""
    return getattr(facts.size, name, None)


def divisors(number: int | None) -> str:
    """ "one of 1, 2, 4" for 4."""
    return "one of " + ", ".join(str(value) for value in range(1, (number or 1) + 1) if (number or 1) % value == 0)


def compared(*conditions: Predicate) -> Callable[[Facts], dict[str, Any]]:
    """Keys that compare layers, where one of `conditions` holds."""

    def broken(facts: Facts) -> dict[str, Any]:
        keys = ("compress.distill.hidden", "compress.distill.relations")
        if not any_of(*conditions)(facts):
            return {}
        return {key: facts.value(key) for key in keys if facts.value(key) > 0}

    return broken


HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")
BELOW_3 = at("parallel.zero_stage", 0, 1, 2)
FLASH = at("model.attention", "flash_attention_2", "flash_attention_3")
CLASSIFYING = "sequence-classification"
CLASSIFIER = at("task.kind", CLASSIFYING)
PIPELINE = above("parallel.pipeline", 1)
TENSOR = above("parallel.tensor", 1)
SEQUENCE = above("parallel.sequence", 1)
PATCHES = above("patch.size", 1)
DROPPING = is_not(at("token_drop.kind", "none"))
LAYER_DROP = is_not(at("layer_drop.kind", "none"))
CURRICULUM = is_not(at("curriculum.kind", "none"))
# DeepSpeed's folders op_builder/{cpu,xpu,hpu} have no quantizer.
NO_QUANTIZER = on_device("cpu", "xpu", "hpu")
