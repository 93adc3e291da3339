"""Files and folders that are there whole or not at all: written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def temporary_path(target: Path, writer: str = "") -> Iterator[Path]:
    """A path next to `target` where a file or a folder can be written, for `move_into_place`. What is still there when
    the block is left, or was left there by a process that was killed, is deleted.

    `writer`: distinguishes processes that may write the same `target` at the same time. Raises OSError.
    """
    made = target.with_name(f".{target.name}{writer and f'.{writer}'}.new")
    _delete(made)
    try:
        yield made
    finally:
        with suppress(OSError):  # the error that ended the block says more
            _delete(made)


def move_into_place(target: Path, made: Path, durable: bool = True) -> None:
    """Let `made` replace `target`, a file or a folder. Raises OSError.

    `durable`: all of it is flushed to the disk before it is renamed, so that it is whole even after a power failure.
    """
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
