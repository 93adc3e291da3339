"""What the command line of `inspect-labels` says besides the config."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LabelsOptions:
    """The options of the command line."""

    split: str = "train"
    indices: tuple[int, ...] = ()
    num: int | None = None
    html: Path | None = None
    all: bool = False
    json: bool = False
    tokens: bool = False
    losses: bool = False
    adapter: Path | None = None
