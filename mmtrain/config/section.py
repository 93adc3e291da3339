"""What all sections of a config are made of."""

import os
import re
from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mmtrain.safe_text import shown


class Marker(Enum):
    """The effect of changing a key. If neither the key nor its section has SAME_RESULT, the key decides the result: a
    run does not resume with another value."""

    SAME_RESULT = "a change does not change the result beyond rounding"
    AFFECTS_BITS = "a change may change the bits of the result, within rounding"


FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which `~` at the beginning is the home folder."""
GivenPath = Annotated[FilePath, Field(min_length=1)]


def _watched(name: str) -> str:
    """`name`, if an evaluation can have such a figure. Raises ValueError."""
    if not re.fullmatch("(eval|answers|retrieval)/.+", name):
        raise ValueError(
            f"expected a figure of an evaluation, such as eval/perplexity or retrieval/recall@1, not {shown(name)}"
        )
    return name


Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(gt=0, le=10**9)]
WatchedMetric = Annotated[str, AfterValidator(_watched)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )
