"""The records of several sources as one list."""

import json
from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.config.data_section import Source
from mmtrain.records.archives import is_archive, open_archive
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.fields import map_fields
from mmtrain.records.formats import read_record
from mmtrain.records.pairs import Pair, read_pair
from mmtrain.records.sources.open import open_records
from mmtrain.records.sources.place import Place, RecordFile


@dataclass(frozen=True, slots=True)
class _OpenFile:
    records: RecordFile
    roots: tuple[Path, ...]
    spec: Source
    source: int


class RecordSet:
    """Random access to every record of several sources. A sample index counts them in the order of the config."""

    def __init__(self, sources: Sequence[Source], ignored: Set[str] = frozenset()) -> None:
        """`ignored`: keys of records that need not be understood. Raises UserError where a source cannot be read."""
        self._ignored = ignored
        self.num_sources = len(sources)
        self._files: list[_OpenFile] = []
        for number, source in enumerate(sources):
            for records in open_records(source.path, source.split):
                roots = tuple(map(Path, source.roots)) or (records.path.parent,)
                self._files.append(_OpenFile(records, roots, source, number))
        for path in self.archives:
            open_archive(path)  # a broken one is found now
        self._ends = list(accumulate(len(file.records) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def files(self) -> list[tuple[Path, tuple[Path, ...], str]]:
        """Each file of records, where its images are, and how its records are read, in order."""
        return [(file.records.path, file.roots, _reading(file.spec)) for file in self._files]

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
        return of_file[np.searchsorted(self._ends, indices, side="right")]

    def place(self, index: int) -> Place:
        """The file and line of a sample."""
        file, local = self._find(index)
        return file.records.place(local)

    def roots(self, index: int) -> tuple[Path, ...]:
        """The folders and archives that a sample's image paths are relative to."""
        return self._find(index)[0].roots

    def conversation(self, index: int) -> Conversation:
        """Raises SampleError where the record is not a conversation."""
        record, spec = self._record(index)
        return read_record(record, spec.format, self._ignored, spec.image_mark)

    def pair(self, index: int) -> Pair:
        """Raises SampleError where the record is not a pair."""
        record, spec = self._record(index)
        if spec.format != "auto":
            raise SampleError(f"`format: {spec.format}` is a format of conversations: pairs are recognised without it")
        return read_pair(record, spec.group, self._ignored, spec.image_mark)

    def _record(self, index: int) -> tuple[Any, Source]:
        """The record of a sample with the keys that `fields` gives it, and its source."""
        file, local = self._find(index)
        return map_fields(file.records.record(local), file.spec.fields), file.spec

    def _find(self, index: int) -> tuple[_OpenFile, int]:
        number = bisect_right(self._ends, index)
        file = self._files[number]
        return file, index - (self._ends[number] - len(file.records))


def _reading(spec: Source) -> str:
    """What decides how a record of the source is read, as text."""
    return json.dumps([spec.format, sorted(spec.fields.items()), spec.image_mark])
