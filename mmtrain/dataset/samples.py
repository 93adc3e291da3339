"""All samples of a list of sources."""

from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmtrain.config.schema import Source
from mmtrain.encoding.encode import Encoded, Encoder, ImageSpan, Traced
from mmtrain.encoding.images import Picture, find_picture, locate
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.formats import read_record
from mmtrain.records.sources import Place, RecordFile, open_records

Indices = npt.NDArray[np.int64]


class Kept(Protocol):
    """Samples that were encoded before, by their numbers."""

    def tokens(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]: ...

    def pictures(self, index: int) -> npt.NDArray[np.int32]: ...


@dataclass(frozen=True, slots=True)
class _OpenFile:
    records: RecordFile
    root: Path
    record_format: str
    source: int


class SampleSet:
    """Random access to every record of several sources, numbered through in the order of the config."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, ignored: Set[str] = frozenset()) -> None:
        """`ignored`: keys of records that need not be understood."""
        self.encoder = encoder
        self._ignored = ignored
        self.num_sources = len(sources)
        self._files: list[_OpenFile] = []
        for number, source in enumerate(sources):
            for records in open_records(source.path):
                root = Path(source.root) if source.root is not None else records.path.parent
                self._files.append(_OpenFile(records, root, source.format, number))
        self._ends = list(accumulate(len(file.records) for file in self._files))
        self._kept: Kept | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def files(self) -> list[tuple[Path, Path, str]]:
        """Each file of records, the folder of its pictures, and its format, in order."""
        return [(file.records.path, file.root, file.record_format) for file in self._files]

    def files_of(self, source: int) -> list[Path]:
        return [file.records.path for file in self._files if file.source == source]

    def sources(self, numbers: Indices) -> Indices:
        """The number of each sample's source."""
        of_file = np.array([file.source for file in self._files])
        return of_file[np.searchsorted(self._ends, numbers, side="right")]

    def use(self, kept: Kept) -> None:
        """Take what was encoded before from there instead of encoding it again."""
        self._kept = kept

    def place(self, index: int) -> Place:
        file, local = self._find(index)
        return file.records.place(local)

    def source(self, index: int) -> int:
        return self._find(index)[0].source

    def conversation(self, index: int) -> Conversation:
        """Raises SampleError where the record is not a conversation."""
        file, local = self._find(index)
        return read_record(file.records.record(local), file.record_format, self._ignored)

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError with the reason the sample cannot be used."""
        if self._kept is None:
            return self.encoder.encode(self.conversation(index), self._find(index)[0].root)
        ids, supervised = self._kept.tokens(index)
        rows = self._kept.pictures(index).tolist()
        images = self.conversation(index).images if rows else ()
        root = self._find(index)[0].root
        spans = [
            ImageSpan(locate(image, root, (width, height)), start, length, num_placeholders)
            for image, (start, length, num_placeholders, width, height) in zip(images, rows, strict=True)
        ]
        return Encoded(ids, supervised, tuple(spans))

    def encode_many(self, numbers: Sequence[int]) -> list[tuple[Conversation | None, Encoded | SampleError]]:
        """Each sample's conversation, None where the record is none, and what it is encoded to now or the reason it
        cannot be used."""
        read: list[tuple[Conversation, Path] | SampleError] = []
        for number in numbers:
            try:
                read.append((self.conversation(number), self._find(number)[0].root))
            except SampleError as error:
                read.append(error)
        made = iter(self.encoder.encode_many(one for one in read if not isinstance(one, SampleError)))
        return [(None, one) if isinstance(one, SampleError) else (one[0], next(made)) for one in read]

    def pictures(self, index: int) -> list[Picture]:
        """The pictures of a sample, found and measured."""
        root = self._find(index)[0].root
        return [find_picture(image, root) for image in self.conversation(index).images]

    def traced(self, index: int) -> Traced:
        """`encoded`, the very ids and labels that training reads, with where each id comes from."""
        return self.encoder.trace(self.conversation(index), self.encoded(index))

    def _find(self, index: int) -> tuple[_OpenFile, int]:
        number = bisect_right(self._ends, index)
        file = self._files[number]
        return file, index - (self._ends[number] - len(file.records))
