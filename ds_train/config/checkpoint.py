"""`checkpoint`: saving, resuming and exporting."""

from __future__ import annotations

from pydantic import Field

from ds_train.config.base import Section


class CheckpointSection(Section):
    """Checkpoints lie in RUN/checkpoints; the export lies in RUN/export."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save after every this many steps. `null` saves at the end only."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are removed after a newer one is whole."""

    resume: str = "auto"
    """`auto` continues the newest whole checkpoint of the run folder, or starts anew where there is none;
    `never` starts anew and refuses a folder that has checkpoints; a path continues that checkpoint."""

    save_final: bool = True
    """Save after the last step."""

    export: bool = True
    """Write the trained model as a transformers folder at the end."""
