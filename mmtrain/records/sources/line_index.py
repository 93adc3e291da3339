"""The byte offsets of the records of a text file: sixteen bytes of memory per record, whatever the size of the file."""

import functools
import itertools
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmtrain.records.chat import SampleError
from mmtrain.records.index_cache import CachedIndex
from mmtrain.records.json_text import MAX_RECORD, too_long
from mmtrain.records.sources.compressed import COMPRESSED, open_plain

_WORTH_KEEPING = 100_000
"""Records from which on finding them takes longer than reading the cache."""


class OffsetIndex(ABC):
    """Records read by their offset. Each ends where the next one begins."""

    def __init__(self, path: Path, kind: str) -> None:
        """`kind` says in the cache how the file is read; raised with every change of that.

        Raises OSError, and UserError for a file that cannot be read as its kind says.
        """
        self.path = path
        self.offsets = array("Q")
        self.lines = array("Q")
        file = open_plain(path)
        try:
            cached = CachedIndex(path, kind)
            end = self._stored(cached)
            self._end = self._scan(file) if end is None else end
        except BaseException:
            file.close()
            raise
        self._unpacked = _Descriptor(file) if path.suffix.lower() in COMPRESSED else None
        """The content of a compressed file; another is opened again when it is read."""
        if self._unpacked is None:
            file.close()
        if end is None and len(self) >= _WORTH_KEEPING:
            offsets, lines = (np.frombuffer(each, np.uint64) for each in (self.offsets, self.lines))
            cached.store(offsets=offsets, lines=lines, end=np.array(self._end))

    def _stored(self, cached: CachedIndex) -> int | None:
        """Take the records from the cache, and return where the last one ends; None where they are not there."""
        stored = cached.load()
        if stored is None:
            return None
        self.offsets.frombytes(stored["offsets"].tobytes())
        self.lines.frombytes(stored["lines"].tobytes())
        return int(stored["end"])

    @abstractmethod
    def _scan(self, file: BinaryIO) -> int:
        """Call `_add` for each record of the opened file, and return where the last one ends."""

    def _add(self, offset: int, line: int) -> None:
        self.offsets.append(offset)
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def content(self, index: int) -> bytes:
        """The bytes of a record. Raises SampleError if they are too many or cannot be read."""
        start = self.offsets[index]
        end = self.offsets[index + 1] if index + 1 < len(self.offsets) else self._end
        try:
            opened = self._unpacked or _opened(self)  # a reference while it is read: if two threads open it, the
            # cache drops one of them
            found = os.pread(opened.number, min(end - start, MAX_RECORD + 1), start)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from None
        if len(found) > MAX_RECORD and b"\n" not in found:
            raise too_long(end - start)
        return found


class LineIndex(OffsetIndex):
    """Records of one or more whole lines each. Blank lines are left out."""

    def __init__(self, path: Path, kind: str, opens: Callable[[bytes], bool] = lambda chunk: False) -> None:
        """`opens`: whether a piece of a line opens or closes what makes the next line part of the same record.

        Raises OSError, and UserError for a compressed file that is broken.
        """
        self._opens = opens
        super().__init__(path, kind)

    def _scan(self, file: BinaryIO) -> int:
        offset = first_offset(file)
        is_open = False
        for number in itertools.count(1):
            start, is_blank, was_open = offset, True, is_open
            while chunk := file.readline(MAX_RECORD):  # the whole line, unless it is too long
                offset += len(chunk)
                is_blank = is_blank and chunk.isspace()
                is_open ^= self._opens(chunk)
                if chunk.endswith(b"\n"):
                    break
            if offset == start:
                break
            if not is_blank and not was_open:
                self._add(start, number)
        return offset


def first_offset(file: BinaryIO) -> int:
    """The offset of the text after a byte order mark, to which `file` is moved."""
    return file.seek(3 if os.pread(file.fileno(), 3, 0) == b"\xef\xbb\xbf" else 0)


class _Descriptor:
    """The descriptor of a file, open as long as this object exists."""

    def __init__(self, file: BinaryIO) -> None:
        """Closes `file` itself: its own end of life could come first, with a warning."""
        self.number = os.dup(file.fileno())
        file.close()

    def __del__(self) -> None:
        os.close(self.number)


@functools.lru_cache(maxsize=64)
def _opened(index: OffsetIndex) -> _Descriptor:
    """The open file, cached: opening it for every record would take as long as parsing the record."""
    return _Descriptor(open_plain(index.path))
