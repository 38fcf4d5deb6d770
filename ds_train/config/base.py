"""The base of every recipe section: frozen, strict, documented by the docstring under each field."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A folder, or an id of the hub. Libraries that are handed it look for no user's home (`~`)."""


class Section(BaseModel):
    """A recipe section. Unknown keys are errors; a docstring under a field is its reference text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )
