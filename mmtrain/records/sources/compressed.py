"""Files of text that may be compressed: opened as plain files, unpacked into an unnamed temporary file."""

import gzip
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

from mmtrain.errors import UserError
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, visible

COMPRESSED = (".gz", ".zst")


def plain_suffix(path: Path) -> str:
    """The ending of a file's name in small letters, without that of its compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def open_plain(path: Path) -> BinaryIO:
    """The file opened for reading. Raises OSError, and UserError if it is not whole or its library is missing."""
    file = open_regular(path)
    if path.suffix.lower() not in COMPRESSED:
        return file
    try:
        with file:
            return _unpacked(path, file)
    except Exception as error:  # each library has its own errors
        if isinstance(error, UserError | MemoryError | OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        raise UserError(f"{visible(str(path))}: not a whole {path.suffix} file: {one_line(error)}") from None


def _unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed by the caller
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as content:
                shutil.copyfileobj(content, unpacked, 2**20)
        else:
            _unpack_zstd(path, file, unpacked)
        unpacked.seek(0)
    except BaseException:
        unpacked.close()
        raise
    return unpacked


def _unpack_zstd(path: Path, file: BinaryIO, unpacked: BinaryIO) -> None:
    """Frame by frame: the library's own streams take a file that is cut off for a whole one."""
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise UserError(
            f"{visible(str(path))}: reading .zst files needs the package zstandard: pip install zstandard, or unpack it"
        ) from None
    frame: Any = None
    while chunk := file.read(2**20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            unpacked.write(frame.decompress(chunk))
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it is cut off")
