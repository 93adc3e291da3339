"""All samples of a list of sources, and the check of every one of them before the first step."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.config.schema import Source
from mmtrain.data.chat import Conversation, SampleError
from mmtrain.data.encode import Encoded, Encoder, Traced
from mmtrain.data.formats import read_record
from mmtrain.data.images import Picture, find_picture
from mmtrain.data.sources import Place, RecordFile, open_records
from mmtrain.errors import UserError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _OpenFile:
    records: RecordFile
    root: Path
    record_format: str
    source: int


class SampleSet:
    """Random access to every record of several sources, numbered through in the order of the config."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder) -> None:
        self.encoder = encoder
        self.num_sources = len(sources)
        self._files: list[_OpenFile] = []
        for number, source in enumerate(sources):
            for records in open_records(source.path):
                root = Path(source.root) if source.root is not None else records.path.parent
                self._files.append(_OpenFile(records, root, source.format, number))
        self._ends = list(accumulate(len(file.records) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> Place:
        file, local = self._find(index)
        return file.records.place(local)

    def source(self, index: int) -> int:
        return self._find(index)[0].source

    def conversation(self, index: int) -> Conversation:
        """Raises SampleError where the record is not a conversation."""
        file, local = self._find(index)
        return read_record(file.records.record(local), file.record_format)

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError with the reason the sample cannot be used."""
        return self.encoder.encode(self.conversation(index), self._find(index)[0].root)

    def pictures(self, index: int) -> list[Picture]:
        """The pictures of a sample, found and measured."""
        root = self._find(index)[0].root
        return [find_picture(image, root) for image in self.conversation(index).images]

    def traced(self, index: int) -> Traced:
        """`encoded`, with where each id comes from."""
        return self.encoder.trace(self.conversation(index), self._find(index)[0].root)

    def _find(self, index: int) -> tuple[_OpenFile, int]:
        number = bisect_right(self._ends, index)
        file = self._files[number]
        return file, index - (self._ends[number] - len(file.records))


@dataclass(slots=True)
class Checked:
    """What the check of a sample set found: the lengths by which steps are cut, and what stays out."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where the sample is not used."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_image_tokens: npt.NDArray[np.int32]
    """(num_samples,) placeholders of its pictures"""
    image_token_pairs: npt.NDArray[np.float64]
    """(num_samples,) the sum of the squares of its pictures' placeholders: what attention among them costs"""
    num_images: int = 0
    picture_files: set[Path] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)

    @property
    def used(self) -> Indices:
        return np.flatnonzero(self.num_tokens)


def check_samples(
    samples: SampleSet, max_length: int, too_long: str = "error", track: Callable[[range], Iterator[int]] = iter
) -> Checked:
    """Encode every sample once. `track` may wrap the numbers to show progress.

    Raises UserError naming the file, the line and the reason of every sample that cannot be used; one that is too
    long is dropped instead where `too_long` says so.
    """
    tokens, supervised, image_tokens = (np.zeros(len(samples), np.int32) for _ in range(3))
    checked = Checked(tokens, supervised, image_tokens, np.zeros(len(samples)))
    for index in track(range(len(samples))):
        try:
            encoded = samples.encoded(index)
        except SampleError as error:
            checked.faults.append(f"{samples.place(index)}: {error}")
            continue
        if encoded.num_tokens > max_length:
            reason = f"{encoded.num_tokens:,} tokens, over the {max_length:,} allowed (data.max_length)"
            if too_long == "drop":
                checked.dropped.append((index, reason))
            else:
                checked.faults.append(f"{samples.place(index)}: {reason}; or set data.too_long to drop")
            continue
        checked.num_tokens[index] = encoded.num_tokens
        checked.num_supervised[index] = encoded.num_supervised
        checked.num_images += len(encoded.images)
        checked.picture_files |= {s.picture.source for s in encoded.images if isinstance(s.picture.source, Path)}
        placeholders = [span.num_placeholders for span in encoded.images]
        checked.num_image_tokens[index] = sum(placeholders)
        checked.image_token_pairs[index] = sum(count**2 for count in placeholders)
    if checked.faults:
        raise UserError(checked.faults)
    if not checked.num_tokens.any():
        raise UserError("every sample was dropped: there is nothing left")
    return checked
