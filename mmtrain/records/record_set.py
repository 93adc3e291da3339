"""The records of several sources as one list."""

import copy
import json
from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmtrain.config.data_section import Source
from mmtrain.records.archives import is_archive, open_archive
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.fields import with_fields
from mmtrain.records.formats import read_record
from mmtrain.records.pairs import Pair, read_pair
from mmtrain.records.reasoning import without_reasoning
from mmtrain.records.sources.open import open_records
from mmtrain.records.sources.place import Place, RecordFile

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of records of a source, opened."""

    records: RecordFile
    spec: Source
    source: int
    """The position of the source in the config's list."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders and archives that image paths are relative to."""
        return tuple(map(Path, self.spec.roots)) or (self.records.path.parent,)


class SourceFile(NamedTuple):
    """A file of records of a source, by what decides its content."""

    path: Path
    roots: tuple[Path, ...]
    """Where its images are."""
    reading: str
    """How its records are read."""


class RecordSet:
    """Random access to every record of several sources. A sample index counts them in the order of the config.

    Each sample is a record, or one of the sequences that its conversation gives; see `sequences`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ignored: Set[str] = frozenset(),
        drops_reasoning: bool = False,
        files: Sequence[OpenFile] | None = None,
    ) -> None:
        """`ignored`: keys of records that need not be understood. `drops_reasoning`: replies are read without it.
        `files`: the files of the sources that are read; None: all.

        Raises UserError where a source cannot be read.
        """
        self._ignored, self._drops_reasoning = ignored, drops_reasoning
        self.num_sources = len(sources)
        self._files = _open(sources) if files is None else files
        self._rows: tuple[Counts, Counts] | None = None
        for path in self.archives:
            open_archive(path)  # a broken one is found now
        self._ends = list(accumulate(len(file.records) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._rows is None else len(self._rows[0])

    def sequences(self, records: Counts, turns: Counts) -> "RecordSet":
        """The same files with other samples: for each its record, and the turn that alone is trained on with what
        precedes it, or -1 for all of the record."""
        if np.array_equal(records, np.arange(self._ends[-1])) and (turns < 0).all():
            return self
        found = copy.copy(self)
        found._rows = records, turns
        return found

    def record(self, index: int) -> int:
        """The number of a sample's record."""
        return index if self._rows is None else int(self._rows[0][index])

    def turn(self, index: int) -> int | None:
        """The turn that alone is trained on in a sample, None where it is all of its record."""
        turn = -1 if self._rows is None else int(self._rows[1][index])
        return None if turn < 0 else turn

    @property
    def files(self) -> list[SourceFile]:
        """In order."""
        return [SourceFile(file.records.path, file.roots, _reading(file.spec)) for file in self._files]

    @property
    def archives(self) -> list[Path]:
        """The archives that images are read from."""
        return sorted({root for file in self._files for root in file.roots if is_archive(root)})

    def files_of(self, source: int) -> list[Path]:
        """The files of one source."""
        return [file.records.path for file in self._files if file.source == source]

    def source(self, index: int) -> int:
        """The source of a sample, as a position in the config's list."""
        return self._find(index)[0].source

    def sources_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The source of each sample."""
        of_file = np.array([file.source for file in self._files])
        records = indices if self._rows is None else self._rows[0][indices]
        return of_file[np.searchsorted(self._ends, records, side="right")]

    def place(self, index: int) -> Place:
        """The file and line of a sample."""
        file, local = self._find(index)
        return file.records.place(local)

    def roots(self, index: int) -> tuple[Path, ...]:
        """The folders and archives that a sample's image paths are relative to."""
        return self._find(index)[0].roots

    def folders(self, index: int) -> list[Path]:
        """Those of `roots` that are no archives."""
        return [root for root in self.roots(index) if not is_archive(root)]

    def conversation(self, index: int) -> Conversation:
        """Raises SampleError where the record is not a conversation."""
        record, spec = self._record(index)
        found = read_record(record, spec.format, self._ignored, spec.image_mark)
        found = without_reasoning(found) if self._drops_reasoning else found
        turn = self.turn(index)
        return found if turn is None else found.up_to(turn)

    def pair(self, index: int) -> Pair:
        """Raises SampleError where the record is not a pair."""
        record, spec = self._record(index)
        if spec.format != "auto":
            raise SampleError(f"`format: {spec.format}` is a format of conversations: pairs are recognised without it")
        if spec.prompt is not None:
            raise SampleError("`prompt` of the source is for conversations: pairs need none")
        return read_pair(record, spec.group, self._ignored, spec.image_mark)

    def _record(self, index: int) -> tuple[Any, Source]:
        """The record of a sample with the keys that its source gives it, and the source."""
        file, local = self._find(index)
        return with_fields(file.records.record(local), file.spec, file.records.path), file.spec

    def _find(self, index: int) -> tuple[OpenFile, int]:
        record = self.record(index)
        number = bisect_right(self._ends, record)
        file = self._files[number]
        return file, record - (self._ends[number] - len(file.records))


def _open(sources: Sequence[Source]) -> list[OpenFile]:
    return [
        OpenFile(records, source, number)
        for number, source in enumerate(sources)
        for records in open_records(source.path, source.split)
    ]


def _reading(spec: Source) -> str:
    """What decides how a record of the source is read, as text."""
    return json.dumps([spec.format, sorted(spec.fields.items()), spec.image_mark, spec.prompt])
