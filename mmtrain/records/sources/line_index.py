"""The byte offsets of the records of a text file: sixteen bytes of memory per record, whatever the size of the file."""

import functools
import itertools
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mmtrain.records.chat import SampleError
from mmtrain.records.json_text import MAX_RECORD, too_long
from mmtrain.records.sources.compressed import COMPRESSED, open_plain


class LineIndex:
    """Records of one or more whole lines each, read by their offset. Blank lines are left out."""

    def __init__(self, path: Path, opens: Callable[[bytes], bool] = lambda chunk: False) -> None:
        """`opens`: whether a piece of a line opens or closes what makes the next line part of the same record.

        Raises OSError, and UserError for a compressed file that is broken.
        """
        self.path = path
        self.offsets = array("Q")
        self.lines = array("L")
        file = open_plain(path)
        offset = 3 if os.pread(file.fileno(), 3, 0) == b"\xef\xbb\xbf" else 0
        file.seek(offset)
        is_open = False
        for number in itertools.count(1):
            start, is_blank, was_open = offset, True, is_open
            while chunk := file.readline(MAX_RECORD):  # the whole line, unless it is too long
                offset += len(chunk)
                is_blank = is_blank and chunk.isspace()
                is_open ^= opens(chunk)
                if chunk.endswith(b"\n"):
                    break
            if offset == start:
                break
            if not is_blank and not was_open:
                self.offsets.append(start)
                self.lines.append(number)
        self._end = offset
        self._unpacked = _Descriptor(file) if path.suffix.lower() in COMPRESSED else None
        """The content of a compressed file; another is opened again when it is read."""
        if self._unpacked is None:
            file.close()

    def __len__(self) -> int:
        return len(self.offsets)

    def content(self, index: int) -> bytes:
        """The bytes of a record. Raises SampleError if they are too many or cannot be read."""
        start = self.offsets[index]
        end = self.offsets[index + 1] if index + 1 < len(self.offsets) else self._end
        try:
            opened = self._unpacked or _opened(self)  # a reference while it is read: if two threads open it, the
            # cache drops one of them
            found = os.pread(opened.file.fileno(), min(end - start, MAX_RECORD + 1), start)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from None
        if len(found) > MAX_RECORD and b"\n" not in found:
            raise too_long(end - start, "bytes")
        return found


class _Descriptor:
    """A file that is open for reading as long as this object exists."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


@functools.lru_cache(maxsize=64)
def _opened(index: LineIndex) -> _Descriptor:
    """The open file, cached: opening it for every record would take as long as parsing the record."""
    return _Descriptor(open_plain(index.path))
