"""The user's cache folder, and the versions of files by which what is cached there is known to be current."""

import os
from pathlib import Path

import platformdirs

Version = tuple[int, int, int]


def cache_folder() -> Path:
    """The user's cache folder, under XDG_CACHE_HOME where that is set."""
    return platformdirs.user_cache_path("mmtrain")


def file_version(path: str | Path) -> Version:
    """A file's size in bytes and its times in nanoseconds, which change when the file does. Raises OSError."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
