"""`compress`: making the model smaller while it trains."""

from __future__ import annotations

from ds_train.config.base import Section
from ds_train.config.distill import DistillSection
from ds_train.config.quantize import QuantizeSection


class CompressSection(Section):
    """Techniques that leave a smaller model than the one that was started with."""

    distill: DistillSection = DistillSection()
    """A teacher beside the labels."""

    quantize: QuantizeSection = QuantizeSection()
    """Weights of few bits."""

    keep_zeros: bool = False
    """Weights of the blocks' linear layers that start as zero stay zero, so that what `ds-train sparsify` has made is
    trained as it is."""
