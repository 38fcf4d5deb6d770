"""`curriculum`: samples that start short and grow to `data.sequence_length`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ds_train.config.base import Section
from ds_train.config.schedule import Share


class CurriculumSection(Section):
    """Sequence-length curriculum (arXiv 2108.06084). The learning rate over tokens stays as it is without."""

    kind: Literal["none", "linear", "root", "discrete"] = "none"
    """How the length grows over the tokens consumed: in a line, as a root (fast at first), or by `lengths`."""

    start_length: int = Field(default=64, ge=8)
    """`linear` and `root`: tokens per sample at the start."""

    fraction: Share = 0.3
    """`linear` and `root`: share of the run after which samples have `data.sequence_length` tokens."""

    root: float = Field(default=2.0, gt=1.0)
    """`root`: the length has grown by progress to the power 1 / root."""

    lengths: tuple[Annotated[int, Field(ge=8)], ...] = ()
    """`discrete`: tokens per sample, in rising order, before `data.sequence_length`."""

    until: tuple[Share, ...] = ()
    """`discrete`: share of the run at which each of `lengths` ends."""

    multiple: int = Field(default=8, ge=1)
    """Lengths are rounded down to a multiple of this where nothing else decides them: `repack` and `keep_tokens` take
    divisors of `data.sequence_length`."""

    how: Literal["repack", "truncate"] = "repack"
    """`repack` cuts every window into short samples, so no token is lost; `truncate` drops what lies behind."""

    keep_tokens: bool = True
    """Take as many more samples a step as they are shorter, so that a step keeps its tokens."""

    @model_validator(mode="after")
    def _pairs(self) -> CurriculumSection:
        if self.kind == "discrete" and not (self.lengths and len(self.lengths) == len(self.until)):
            raise ValueError("discrete needs `lengths` and as many `until`")
        for name in ("lengths", "until"):
            values = list(getattr(self, name))
            if values != sorted(set(values)):
                raise ValueError(f"`{name}` are in rising order")
        return self
