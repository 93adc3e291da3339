"""What all sections of a config are made of."""

import os
from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Marker(Enum):
    """The effect of changing a key. If neither the key nor its section has SAME_RESULT, the key decides the result: a
    run does not resume with another value."""

    SAME_RESULT = "a change does not change the result beyond rounding"
    AFFECTS_BITS = "a change may change the bits of the result, within rounding"


FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which `~` at the beginning is the home folder."""
GivenPath = Annotated[FilePath, Field(min_length=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(gt=0, le=10**9)]
WatchedMetric = Annotated[str, Field(pattern=r"^(eval|answers|retrieval)/.+$")]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )
