"""`compress.quantize`: quantization-aware training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Section


class QuantizeSection(Section):
    """Quantization-aware training (arXiv 1712.05877): the linear layers of every block compute with rounded weights,
    whose gradient goes straight through to the full ones. What is exported are the rounded ones, packed in the
    compressed-tensors format, which `from_pretrained` loads. Embeddings, norms and heads stay as they are."""

    weights: Literal["none", "int8", "int4"] = "none"
    """Integers that the weights are rounded to, symmetric around 0. Memory while training stays that of full ones."""

    group: int = Field(default=0, ge=0)
    """Inputs of a matrix that share a scale in each of its rows; 0 is one scale a row. 128 or 64 for int4."""

    activations: Literal["none", "int8"] = "none"
    """`int8`: what a linear layer is given is rounded too, with one scale a token, found as it comes. Needs int8
    weights with one scale a row."""

    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the run after which it rounds; before, it trains as ever."""

    @property
    def bits(self) -> int:
        """Bits of a weight; 0 without quantization."""
        return {"none": 0, "int8": 8, "int4": 4}[self.weights]
