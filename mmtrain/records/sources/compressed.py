"""Files of text that may be compressed: opened as plain files, unpacked into an unnamed temporary file."""

import gzip
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

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
        with file, _decompressed(path, file) as content:
            return _unpacked(content)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if not isinstance(error, gzip.BadGzipFile):
            raise
        reason = one_line(error)
    except Exception as error:  # each library has its own errors
        reason = one_line(error)
    raise UserError(f"{visible(str(path))}: not a whole {path.suffix} file: {reason}")


def _unpacked(content: IO[bytes]) -> BinaryIO:
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed by the caller
    try:
        shutil.copyfileobj(content, unpacked, 2**20)
        unpacked.seek(0)
    except BaseException:
        unpacked.close()
        raise
    return unpacked


def _decompressed(path: Path, file: BinaryIO) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(file))
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise UserError(
            f"{visible(str(path))}: reading .zst files needs the package zstandard: pip install zstandard, or unpack it"
        ) from None
    return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
