"""Where the records of a file are: found once, then kept in the user's cache as long as it is used.

A cached index is an .npz file, whose name is a hash of the indexed file's path and version. It is written whole or not
at all, and its checksums are verified when it is read.
"""

import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.atomic_files import replacing
from mmtrain.user_cache import cache_folder, file_version, remove_unused, used

Arrays = dict[str, npt.NDArray[Any]]


class CachedIndex:
    """The place in the cache for the index of one file, as the file is now."""

    def __init__(self, path: Path, kind: str) -> None:
        """`kind` says how the file is read; raised with every change of what is stored. Raises OSError."""
        named = f"{kind} {file_version(path)} {path.resolve()}"
        self._path = cache_folder() / "index" / f"{hashlib.sha256(os.fsencode(named)).hexdigest()[:32]}.npz"

    def load(self) -> Arrays | None:
        """What `store` was given, None where nothing was or it is damaged."""
        # a damaged file raises anything
        with suppress(Exception), self._path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
            used(self._path)
            return found
        return None

    def store(self, **arrays: Any) -> None:
        """Write the arrays of the index; a cache that cannot be written only costs time."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unused(self._path.parent)
            with replacing(self._path, str(os.getpid()), durable=False) as made, made.open("wb") as file:
                np.savez(file, **arrays)


@functools.cache
def _remove_unused(folder: Path) -> None:
    """Once in a process: it may make the indices of thousands of files."""
    remove_unused(folder)
