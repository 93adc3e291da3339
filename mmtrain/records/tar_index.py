"""Where the members of a tar file are: found once, then cached in the user's cache."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.index_cache import CachedIndex
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, shown, visible

_KIND = "tar 2"
_WORTH_KEEPING = 1000
"""Members from which on finding them takes longer than reading the cache."""

Ints = npt.NDArray[np.int64]


class TarIndex:
    """The members of a plain tar file, in its order; folders and hidden files left out."""

    def __init__(self, path: Path, names: npt.NDArray[np.uint8], offsets: Ints, sizes: Ints) -> None:
        """`names`: all names, each closed by a null."""
        self.path = path
        self._names, self._offsets, self._sizes = names, offsets, sizes
        self._ends = np.flatnonzero(names == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def names(self) -> Iterator[str]:
        """All names, in half the time that `name` of each takes."""
        return map(os.fsdecode, self._names.tobytes().split(b"\0")[:-1])

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])].tobytes())

    def content(self, index: int, file: BinaryIO, max_size: int) -> bytes:
        """The bytes of a member, read from the opened file. Raises SampleError if they are too many or cut off."""
        size, name = int(self._sizes[index]), self.name(index)
        if size > max_size:
            raise SampleError(f"the member {shown(name)} has {size:,} bytes, over the {max_size:,} allowed")
        found = os.pread(file.fileno(), size, int(self._offsets[index]))
        if len(found) < size:
            raise SampleError(f"the member {shown(name)} is cut off: {len(found):,} of {size:,} bytes")
        return found


def tar_index(path: Path) -> TarIndex:
    """The index of the tar file `path`. Raises OSError, and UserError if it is not a plain, whole tar file."""
    with open_regular(path) as file:
        cached = CachedIndex(path, _KIND)
        if (stored := cached.load()) is not None:
            return TarIndex(path, **stored)
        found = _members(path, file)
    names = np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name, _, _ in found), np.uint8)
    offsets, sizes = np.array([one[1:] for one in found], np.int64).reshape(-1, 2).T
    if len(found) >= _WORTH_KEEPING:
        cached.store(names=names, offsets=offsets, sizes=sizes)
    return TarIndex(path, names, offsets, sizes)


def _members(path: Path, file: BinaryIO) -> list[tuple[str, int, int]]:
    where, size = visible(str(path)), os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found = [(one.name, one.offset_data, one.size) for one in tar if _is_file(where, one)]
            end = tar.offset
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{where}: not a plain tar file: {one_line(error)}") from None
    if os.pread(file.fileno(), 512, end).strip(b"\0") or end > size:
        last = f" after the member {shown(found[-1][0])}" if found else ""
        raise UserError(f"{where}: the tar file is broken{last}: make it again")
    return found


def _is_file(where: str, member: tarfile.TarInfo) -> bool:
    if member.isdir() or PurePosixPath(member.name).name.startswith("."):
        return False
    if not member.isreg() or member.issparse() or "\0" in member.name:
        raise UserError(f"{where}: the member {shown(member.name)} is not a plain file: leave it out")
    return True
