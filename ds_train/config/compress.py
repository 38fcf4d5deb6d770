"""`compress`: making the model smaller while it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.distill import DistillSection
from ds_train.config.parallel import ParallelSection
from ds_train.config.quantize import QuantizeSection

Part = Annotated[float, Field(ge=0.0, lt=1.0)]
Layer = Annotated[int, Field(ge=0)]

PRUNED_KINDS = ("heads", "ffn", "experts", "hidden", "layers")
"""What can be pruned, by the keys of `compress.prune`."""

PRUNE_TARGETS = ("parameters", "latency", "latency_ms")
"""Its keys that ask for a size or a time."""


class PruneSection(Section):
    """Structured pruning: units are scored, masked, and cut out of the model and of the optimizer's states in the
    middle of the run. What is exported is a stock model of the smaller size."""

    heads: Part = 0.0
    """Share of the key/value heads of each layer, with the query heads of each, that goes. Families whose config has no
    head size of its own (GPT-2, BERT, GPT-NeoX) lose heads with `hidden` alone, the same share of both."""

    ffn: Part | Annotated[list[Part], Field(min_length=1)] | dict[Layer, Part] = 0.0
    """Share of the feed-forward channels of each layer that goes. With `budget: per-layer` a list, a share for each,
    or a mapping of layers, from 0, to theirs; other layers keep all."""

    budget: Literal["uniform", "per-layer", "global"] = "uniform"
    """How the feed-forward channels that go are spread over layers: as many from each, `uniform`; from each its own
    share, `per-layer`; as many in all as with `uniform`, but those of least worth in the model, `global`. Worth is then
    the score over its layer's norm (arXiv 1611.06440), and a layer keeps at least `multiple`. Both need a family
    whose config has a feed-forward size for each layer."""

    experts: Part = 0.0
    """Share of the experts of each layer of a mixture that goes."""

    hidden: Part = 0.0
    """Share of the hidden size that goes: of embeddings, norms, head, and every matrix that reads or writes it."""

    layers: int = Field(default=0, ge=0)
    """Layers that go: those whose output is most like their input (arXiv 2403.03853), whatever `score` says."""

    parameters: int | None = Field(default=None, ge=1)
    """Parameters that the model is to have at most. The shares above then say proportions, and all are scaled together
    until it has so many, or a few less."""

    latency: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Time that the model's forward pass is to take at most, as a share of what it takes before anything goes. As with
    `parameters`, the shares above are scaled together. Times are measured before training on rank 0's device, on models
    of random weights in the run's number format."""

    latency_ms: float | None = Field(default=None, gt=0.0)
    """The same in milliseconds."""

    latency_samples: int = Field(default=1, ge=1)
    """Samples of the forward pass that is measured."""

    latency_length: int | None = Field(default=None, ge=1)
    """Tokens of each of them; left out, data.sequence_length."""

    score: Literal["taylor", "fisher", "activation", "wanda", "magnitude", "gates"] = "taylor"
    """What a unit is worth: the size of the sum over tokens of its output times the loss's gradient of it, `taylor`
    (arXiv 1905.10650 takes each sample's size instead), or the sum of its squares, `fisher`; the norm of its output,
    `activation`, times that of the weights that read it, `wanda` (arXiv 2306.11695); the norm of its weights,
    `magnitude`. `gates` are learned beside the weights over `score_steps` steps: random ones from 0 to 1 (hard
    concrete, arXiv 1712.01312), of which as many are expected to be open in the end as units stay; those least likely
    to be open go."""

    score_steps: int = Field(default=16, ge=1)
    """Steps before `start` over which scores are summed."""

    start: Part = 0.1
    """Share of the run after which units are chosen and begin to close."""

    end: Part = 0.5
    """Share of the run at which all chosen units are closed and are cut out."""

    shape: Literal["cubic", "linear", "steps", "one-shot"] = "cubic"
    """How units close between start and end, those of least worth first: by 1 - (1 - t)^3 (arXiv 1710.01878), in a
    line, in four steps, or all at the end. The one that is closing is dimmed in proportion."""

    multiple: int = Field(default=8, ge=1)
    """Feed-forward channels, and the hidden size, that stay are rounded up to a multiple of this."""

    parallel: ParallelSection | None = None
    """Layout of the same ranks from the cut on; as before without it."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is asked to go."""
        return tuple(kind for kind in PRUNED_KINDS if self.share(kind))

    def share(self, kind: str) -> float:
        """Share of the units of a kind that goes (layers: their number), the largest of any layer."""
        value = getattr(self, kind)
        if isinstance(value, dict):
            value = list(value.values())
        return float(max(value, default=0.0) if isinstance(value, list) else value)

    def share_in(self, layer: int) -> float:
        """Share of the feed-forward channels of layer `layer` that goes."""
        if isinstance(self.ffn, dict):
            return self.ffn.get(layer, 0.0)
        return self.ffn[layer] if isinstance(self.ffn, list) else self.ffn

    @property
    def targets(self) -> tuple[str, ...]:
        """The keys that ask for a size or a time, to which shares are scaled."""
        return tuple(key for key in PRUNE_TARGETS if getattr(self, key) is not None)


class CompressSection(Section):
    """Techniques that leave a smaller model than the one that was started with."""

    distill: DistillSection = DistillSection()
    """A teacher beside the labels."""

    quantize: QuantizeSection = QuantizeSection()
    """Training with rounded weights."""

    keep_zeros: bool = False
    """Weights of the blocks' linear layers that start as zero stay zero, so that what `ds-train sparsify` has made is
    trained as it is."""

    prune: PruneSection = PruneSection()
    """Structured pruning."""
