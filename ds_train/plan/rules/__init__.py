"""Everything that can't be combined, as tables that are checked before any process does work.

A rule looks at the whole recipe and the cluster and names the key, the reason and the nearest thing that works.
Each comes from DeepSpeed's, torch's or transformers' source, or from a run that went wrong without a word. A new rule
is a row of the table of its subject, and a recipe that breaks it in tests/unit/plan/test_plan_rules.py.
"""

from __future__ import annotations

from ds_train.errors import Problem
from ds_train.plan.facts import Facts
from ds_train.plan.rules import compress, data, layout, model, prune, raw, reports, states, tokens, training, unread
from ds_train.plan.rules.base import KeyRule, Rule

__all__ = ["RULES", "KeyRule", "Rule", "check"]

RULES: tuple[Rule | KeyRule, ...] = tuple(
    rule
    for table in (layout, states, training, tokens, prune, model, data, compress, reports, raw, unread)
    for rule in table.RULES
)
"""Every rule, in the order in which they are told."""


def check(facts: Facts) -> list[Problem]:
    """Every rule that the recipe breaks, in the order of the tables."""
    return [problem for rule in RULES for problem in rule.check(facts)]
