"""Files and folders that are there whole or not at all: written under a temporary name, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmtrain.errors import StorageError, UserError, storage_faults
from mmtrain.safe_text import visible


@contextmanager
def replacing(target: Path, writer: str = "", durable: bool = True) -> Iterator[Path]:
    """A path next to `target` where a file or a folder is written, which replaces `target` at the end of the block.
    After an error it is deleted, and so is what a process that was killed left there.

    `writer`: distinguishes processes that may write the same `target` at the same time. `durable`: all of it is flushed
    to the disk before it is renamed, so that it is whole even after a power failure. Raises OSError.
    """
    made = target.with_name(f".{target.name}{writer and f'.{writer}'}.new")
    _delete(made)
    try:
        yield made
        _move_into_place(target, made, durable)
    finally:
        with suppress(OSError):  # the error that ended the block says more
            _delete(made)


def check_writable(target: Path, name: str = "") -> None:
    """Raises StorageError, before anything is computed, where no file or folder can be made at `target`, whose folder
    may not be there yet. `name`: what the error calls it."""
    try:
        with suppress(FileNotFoundError):
            target.with_name(f".{target.name}.new").lstat()  # a name that is too long, a folder that is a file
        tempfile.TemporaryFile(dir=_nearest(target)).close()
    except OSError as error:
        why = f"{error.strerror}; name another path"
        raise StorageError(f"{name or visible(str(target))}: it cannot be written: {why}") from None


def check_room(target: Path, size: int) -> None:
    """Raises StorageError, before anything is computed, where `size` bytes at `target` do not fit on its disk."""
    free = shutil.disk_usage(_nearest(target)).free
    if free < size:
        raise StorageError(
            f"{visible(str(target))}: it needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free: free space or "
            "name another path"
        )


def _nearest(target: Path) -> Path:
    """The nearest folder around `target` that is there."""
    return next(one for one in target.absolute().parents if one.exists())


def check_new(target: Path, kind: str) -> None:
    """`check_writable`, and raises UserError where there is something: expected a new `kind`, a directory or a file."""
    if os.path.lexists(target):
        raise UserError(f"{visible(str(target))}: it exists: give a new {kind} with -o")
    check_writable(target)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """`replacing` a folder that is not there, in one that may not be there either. Raises StorageError."""
    with storage_faults(f"{visible(str(target))}: it cannot be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as made:
            yield made


def write_text(target: Path, text: str, durable: bool = True) -> None:
    """Replace the file `target` by one with this text. Raises OSError."""
    with replacing(target, durable=durable) as made:
        made.write_text(text, encoding="utf-8", newline="\n")


def _move_into_place(target: Path, made: Path, durable: bool) -> None:
    if durable:
        for path in [*made.rglob("*"), made]:
            flush(path)
    old = target.with_name(f".{target.name}.old")
    replaces_folder = target.is_dir()  # a rename replaces a file, but not a folder with files in it
    if replaces_folder:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    made.replace(target)
    if durable:
        flush(target.parent)
    if replaces_folder:
        shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
