"""Whether attention relations of a model and its teacher can be compared (compress/compared.py), from their sizes."""

from __future__ import annotations

from math import gcd

from ds_train.config.model import ModelSection
from ds_train.plan.facts import Facts
from ds_train.plan.model_size import ModelSize, model_size


def teacher_size(facts: Facts) -> ModelSize | None:
    """Sizes of the recipe's teacher; None without one, or where it isn't on this machine."""
    distill = facts.run.compress.distill
    if not distill.active:
        return None
    if distill.teacher is None:
        return facts.size
    return model_size(ModelSection(path=distill.teacher), facts.run.task.kind)


def other_heads(facts: Facts) -> str | None:
    """Why attention can't be compared head by head, in a phrase."""
    ours, theirs = facts.size, teacher_size(facts)
    distill = facts.run.compress.distill
    if distill.relations == 0 or "attention" not in distill.relation_kinds or ours is None or theirs is None:
        return None
    if ours.num_attention_heads == theirs.num_attention_heads:
        return None
    return (
        f"attention is compared head by head, and the model has {ours.num_attention_heads} heads, the teacher "
        + str(theirs.num_attention_heads)
    )


def relation_heads(facts: Facts) -> int | None:
    """Heads that queries, keys and values are cut anew into; None where the teacher's aren't known."""
    theirs = teacher_size(facts)
    return facts.run.compress.distill.relation_heads or (theirs.num_attention_heads if theirs else None)


def uneven_heads(facts: Facts) -> str | None:
    """What can't be cut into so many heads, in a phrase."""
    heads, sizes = relation_heads(facts), (facts.size, teacher_size(facts))
    if heads is None or facts.run.compress.distill.relations == 0 or not _cut_anew(facts):
        return None
    for who, size in zip(("the model", "the teacher"), sizes, strict=True):
        for kind, width in widths(size).items():
            if kind in _cut_anew(facts) and width % heads:
                return f"the {kind} states of {who} are {width} wide, which {heads} heads don't divide"
    return f"{facts.tensor} tensor ranks don't share {heads} heads evenly" if heads % facts.tensor else None


def even_heads(facts: Facts) -> str:
    """Numbers of heads that would do."""
    found = 0
    for size in (facts.size, teacher_size(facts)):
        for kind, width in widths(size).items():
            found = gcd(found, width) if kind in _cut_anew(facts) else found
    fit = [heads for heads in range(1, found + 1) if found % heads == 0 and heads % facts.tensor == 0]
    return "one of " + ", ".join(map(str, fit)) if fit else "compare other relation_kinds, or set relations=0"


def widths(size: ModelSize | None) -> dict[str, int]:
    """Width of all heads together of queries, keys and values; empty where it isn't known."""
    if size is None or not size.num_attention_heads or not size.hidden_size:
        return {}
    head = size.head_dim or size.hidden_size // size.num_attention_heads
    shared = (size.num_key_value_heads or size.num_attention_heads) * head
    return {"query": size.num_attention_heads * head, "key": shared, "value": shared}


def _cut_anew(facts: Facts) -> set[str]:
    return {kind for kind in facts.run.compress.distill.relation_kinds if kind != "attention"}
