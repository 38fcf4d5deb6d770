"""`ds-train plan --why zero3`: one way to run a recipe, with what it needs, or what forbids it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ds_train.config import RunConfig
from ds_train.errors import UserError, user_error
from ds_train.plan.facts import Facts
from ds_train.plan.predict import Prediction, Predictor
from ds_train.plan.search import Scored, nearest, settle
from ds_train.plan.topology import Cluster

_WORDS: dict[str, tuple[str, Any]] = {
    "zero": ("parallel.zero_stage", int), "pipe": ("parallel.pipeline", int), "pipeline": ("parallel.pipeline", int),
    "tensor": ("parallel.tensor", int), "sequence": ("parallel.sequence", int), "micro": ("batch.micro_samples", int),
    "offload": ("parallel.offload_optimizer", "cpu"), "offload-params": ("parallel.offload_params", "cpu"),
    "nvme": ("parallel.offload_optimizer", "nvme"), "checkpointing": ("model.activation_checkpointing", True),
}  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """What `question` asked: the best way to do so, its prediction, and why it can't be; None where nothing forbids it.

    `scored` and `predicted` are None where a rule forbids it.
    """

    question: str
    scored: Scored | None
    predicted: Prediction | None
    against: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "why": self.question,
            "choice": self.scored.label if self.scored else None,
            "against": self.against,
            "predicted": self.predicted.to_dict() if self.predicted else None,
        }


def explain(run: RunConfig, cluster: Cluster, question: str) -> Explanation:
    """Answer for the recipe with the fields that `question` names set; what else says `auto` is chosen for the best.

    Raises:
        UserError: the question isn't understood.
    """
    asked = settle(run, _fields(question))
    found = nearest(asked, cluster)
    if isinstance(found, UserError):
        return Explanation(question, None, None, "; ".join(map(str, found.problems)))
    predictor = Predictor.of(Facts(found.run, cluster))
    assert predictor is not None
    predicted = predictor.predict(found.choice)
    return Explanation(question, found, predicted, predicted.shortage)


def _fields(question: str) -> dict[str, Any]:
    """Recipe keys of words such as zero3, pipe2, offload, joined by + or commas."""
    fields: dict[str, Any] = {}
    for word in filter(None, re.split(r"[+, ]+", question.lower())):
        match = re.fullmatch(r"([a-z-]+?)-?(\d*)", word)
        known = _WORDS.get(match[1]) if match else None
        if match is None or known is None or (known[1] is int) != bool(match[2]):
            words = ", ".join(f"{name}N" if value is int else name for name, (_, value) in _WORDS.items())
            raise user_error("--why", f"{word} isn't understood", f"join {words} with +", question)
        key, value = known
        if key in fields:
            raise user_error("--why", f"{word} is a second value of {key}", "ask about one after the other", question)
        fields[key] = int(match[2]) if value is int else value
    if not fields:
        raise user_error("--why", "it asks nothing", "for example zero3, or pipe2+tensor4", question)
    if any(value == 0 for key, value in fields.items() if key != "parallel.zero_stage"):
        raise user_error("--why", "degrees and samples are at least 1", "for example pipe2+tensor4", question)
    if fields.get("parallel.zero_stage", 0) > 3:
        raise user_error("--why", "ZeRO has stages 0 to 3", "for example zero3", question)
    return fields
