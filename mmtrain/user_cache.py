"""The user's cache folder: which files there are current, and which are removed because nobody uses them."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

Version = tuple[int, int, int]
_UNUSED_SECONDS = 30 * 24 * 3600
"""Cached files that nobody used for so long are removed when another one is made."""


def cache_folder() -> Path:
    """The user's cache folder, under XDG_CACHE_HOME where that is set."""
    return platformdirs.user_cache_path("mmtrain")


def file_version(path: str | Path) -> Version:
    """A file's size in bytes and its times in nanoseconds, which change when the file does. Raises OSError."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def used(path: Path) -> None:
    """Note that a cached file is used now, as far as the file system allows."""
    with suppress(OSError):
        os.utime(path)


def remove_unused(folder: Path) -> None:
    """Remove what nobody used in `folder` for a long time, except locks."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.suffix == ".lock" or time.time() - path.stat().st_mtime <= _UNUSED_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
