"""`compress.distill`: a teacher beside the labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Place, Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Layer = Annotated[int, Field(ge=0)]
Relation = Literal["attention", "query", "key", "value"]


class DistillSection(Section):
    """Distillation (arXiv 1503.02531): the model also learns what a teacher gives, logits, hidden states or attention.
    The loss is (1 - alpha) x that of the labels + alpha x that of the logits + that of the hidden states + that of
    attention, at every labelled position."""

    teacher: Place | None = None
    """Local folder or hub id of the teacher: any transformers model for the same task and tokens. Left out, it is the
    run's own `model.path`, as it was before training."""

    logits: Literal["none", "forward-kl", "reverse-kl", "js"] = "none"
    """Divergence of the model's distribution from the teacher's: `forward-kl` covers all that the teacher finds likely,
    `reverse-kl` (arXiv 2306.08543) keeps to its likeliest, `js` (arXiv 2306.13649) is between the two."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Both distributions' logits are divided by it, and their loss is multiplied by its square."""

    alpha: Share = 0.5
    """Share of the teacher's logits in the loss at the start of the run."""

    alpha_end: Share | None = None
    """Share at the end of the run, which `alpha` reaches in a line over the tokens; left out, it stays."""

    cache_top: int = Field(default=0, ge=0)
    """Likeliest logits of the teacher that are kept on disk for every labelled position, worked out once before
    training: the teacher is in nobody's memory then. All other tokens count as one. 0 runs the teacher beside the
    model."""

    hidden: float = Field(default=0.0, ge=0.0)
    """Weight of the hidden states' loss: the mean squared difference of the layers' outputs, through a learned matrix
    to the teacher's width (arXiv 1909.10351). It is a sample's mean over tokens, times its labels."""

    hidden_layers: list[tuple[Layer, Layer]] | None = None
    """Pairs of a layer of the model and of the teacher, from 0; left out, every layer is paired with the teacher's at
    the same share of its depth."""

    relations: float = Field(default=0.0, ge=0.0)
    """Weight of the loss of attention: the divergence (forward KL) of how tokens relate in a layer from how they do in
    the teacher's (MiniLM), a sample's mean over tokens and heads, times its labels."""

    relation_kinds: list[Relation] = Field(default=["query", "key", "value"], min_length=1)
    """What is compared: softmaxes of the products of queries with queries, keys with keys, values with values (arXiv
    2012.15828), whose heads are cut anew so that any two models compare; or `attention`, queries with keys by the
    models' own heads, of which both must have as many ([attention, value] is arXiv 2002.10957)."""

    relation_heads: int | None = Field(default=None, ge=1)
    """Heads that queries, keys and values are cut anew into; left out, as many as the teacher has for queries."""

    relation_layers: list[tuple[Layer, Layer]] | None = Field(default=None, min_length=1)
    """Pairs of a layer of the model and of the teacher, from 0; left out, the last of each."""

    placement: Literal["memory", "sharded", "offloaded"] = "memory"
    """Where the teacher's weights are. `memory`: whole on every device that runs it. `sharded`: in shares on the
    devices that run it, each module gathered when its turn comes (ZeRO-3 without an optimizer). `offloaded`: those
    shares in host memory. The losses are the same."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the teacher's weights; `auto` is the model's."""

    @property
    def active(self) -> bool:
        """Whether there is a teacher."""
        return self.logits != "none" or self.compares

    @property
    def compares(self) -> bool:
        """Whether layers are compared with the teacher's."""
        return self.hidden > 0 or self.relations > 0
