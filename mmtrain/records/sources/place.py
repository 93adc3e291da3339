"""What every file of records offers, and where a record is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmtrain.safe_text import visible


@dataclass(frozen=True, slots=True)
class Place:
    """The file and line of a record, for every message about it: `file:line`, `file#row` or `shard.tar#key`."""

    file: Path
    line: int
    """From 1: the line of a text file, the row of a table, the sample of a shard."""
    item: int | None = None
    """Counted from 1, if several records of a list are on the same line."""
    key: str | None = None
    """How the record is called where it is not on a line: the number of a row, the key of a sample."""

    def __str__(self) -> str:
        file = visible(str(self.file))
        if self.key is not None:
            return f"{file}#{visible(self.key)}"
        return f"{file}:{self.line}" + (f" item {self.item}" if self.item is not None else "")


class RecordFile(Protocol):
    """The records of one file, in order."""

    path: Path

    def __len__(self) -> int: ...

    def place(self, index: int) -> Place: ...

    def record(self, index: int) -> Any:
        """The record. Raises SampleError with the reason if it cannot be read."""
        ...
