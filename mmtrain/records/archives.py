"""Images in a zip or tar file, read without unpacking it."""

import functools
import os
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.tar_index import tar_index
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, shown, visible
from mmtrain.user_cache import file_version

_ENDINGS = (".zip", ".tar")


def is_archive(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and not path.is_dir()


class Archive(ABC):
    """An opened archive. Its file is closed when nothing needs it any more."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # it could be opened
            self._file.close()

    @abstractmethod
    def read(self, name: str, max_size: int) -> bytes | None:
        """The bytes of the member `name`, None if there is none. Raises SampleError if they cannot be read, or are more
        than `max_size`."""


def open_archive(path: Path) -> Archive:
    """The archive `path`, opened once by each process. Raises UserError if it is none, or broken."""
    try:
        return _opened(path, file_version(path), os.getpid())
    except OSError as error:
        raise UserError(f"{visible(str(path))}: cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=16)
def _opened(path: Path, version: object, process: int) -> Archive:
    """Cached by `version`, because a file that has changed is opened again, and by `process`, because processes that
    share a descriptor share its position."""
    return _Zip(path) if path.suffix.lower() == ".zip" else _Tar(path)


def _normal(name: str) -> str:
    """`a/b.png` for `./a//b.png`; a name that leads out of the archive is that of no member."""
    return str(PurePosixPath(name.replace("\\", "/")))


class _Tar(Archive):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index = tar_index(path)
        self._numbers = {_normal(name): number for number, name in enumerate(self._index.names())}

    def read(self, name: str, max_size: int) -> bytes | None:
        number = self._numbers.get(_normal(name))
        return None if number is None else self._index.content(number, self._file, max_size)


class _Zip(Archive):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(self._file)
            members = self._zip.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise UserError(f"{visible(str(path))}: not a whole zip file: {one_line(error)}") from None
        self._members = {_normal(member.filename): member for member in members if not member.is_dir()}

    def read(self, name: str, max_size: int) -> bytes | None:
        member = self._members.get(_normal(name))
        if member is None:
            return None
        if member.file_size > max_size:
            raise SampleError(f"{member.file_size:,} bytes when unpacked, over the {max_size:,} allowed")
        try:
            with self._zip.open(member) as file:
                found = file.read(member.file_size + 1)
        except Exception as error:  # a broken member raises anything, also from the libraries that unpack it
            raise SampleError(f"the member {shown(name)} cannot be unpacked: {one_line(error)}") from None
        if len(found) != member.file_size:
            raise SampleError(f"the member {shown(name)} has not the {member.file_size:,} bytes that its header says")
        return found
