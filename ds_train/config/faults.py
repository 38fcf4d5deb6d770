"""`faults`: how a run ends when it is told to, or when a rank no longer answers."""

from __future__ import annotations

from pydantic import Field

from ds_train.config.base import Section


class FaultsSection(Section):
    """A run that is told to stop saves first; one that hangs says where, and ends."""

    grace_seconds: float = Field(default=120.0, gt=0.0)
    """SIGTERM, SIGINT or SIGUSR1 to any rank: all ranks save after the current step and end with exit code 75. What
    takes longer than this is left, and the older checkpoints are what there is."""

    late_factor: float = Field(default=20.0, gt=1.0)
    """A step that takes this many times the median of the last ones (per token) is hanging, and so is a wait for its
    samples: every rank writes its stack to RUN/faults, the late rank is named, and the run ends with exit code 76."""

    late_floor_seconds: float = Field(default=300.0, gt=0.0)
    """No step is hanging before this time, and no rank is given up that hasn't answered for less."""

    first_step_seconds: float = Field(default=1800.0, gt=0.0)
    """The same for the first step, and for the first one of every sequence length, which may compile; and for the next
    document of the source, while data are prepared."""
