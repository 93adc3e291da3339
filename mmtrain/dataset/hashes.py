"""SHA-256 of files, stored in the user's cache by path, size and times, so that a file is hashed once."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from mmtrain.encoding.directory import files_in, model_directory, processor_files
from mmtrain.user_cache import cache_folder, file_version

_WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_THREADS = 4
_SETTLED_SECONDS = 2.0
"""A file that changed within so many seconds may change again without a new time: its hash is not stored."""

_TABLE = "file_hashes (path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, status_changed INTEGER, sha256 TEXT)"

Key = tuple[str, int, int, int]


def digest(paths: Iterable[Path], tick: Callable[[], None] = lambda: None) -> str:
    """One hash over the files' hashes, in their order. `tick` is called for every file. Raises OSError."""
    together = hashlib.sha256()
    for own in file_hashes(list(paths)):
        together.update(bytes.fromhex(own))
        tick()
    return together.hexdigest()


def model_fingerprints(path: str, tick: Callable[[], None]) -> dict[str, str]:
    """A SHA-256 of the weights and one of the processor's files of the model at `path`."""
    folder = model_directory(path)
    return {
        "model.weights": digest(files_in(folder, _WEIGHT_FILES), tick),
        "model.processor": digest(processor_files(folder), tick),
    }


def file_hashes(paths: list[Path]) -> Iterator[str]:
    """The SHA-256 of each file, in order. Raises OSError where one cannot be read."""
    keys = [file_key(path) for path in paths]
    with closing(open_cache(_TABLE)) as cache, ThreadPoolExecutor(_THREADS) as pool:
        known = {key: _look_up(cache, key) for key in keys}
        made = {key: pool.submit(sha256_of, key[0]) for key, digest in known.items() if digest is None}
        for key in keys:
            yield known[key] or made[key].result()
        fresh = [(*_row(key), future.result()) for key, future in made.items()]
        settled = time.time_ns() - _SETTLED_SECONDS * 1e9
        with suppress(sqlite3.Error), cache:  # a cache that cannot be written only costs time
            cache.executemany(
                "INSERT OR REPLACE INTO file_hashes VALUES (?, ?, ?, ?, ?)", [r for r in fresh if r[2] < settled]
            )


def image_hashes(sources: Iterable[Path | bytes]) -> dict[Path | bytes, str]:
    """The SHA-256 of each image, a file or the bytes of one. Raises OSError where a file cannot be read."""
    distinct = dict.fromkeys(sources)
    files = [source for source in distinct if isinstance(source, Path)]
    hash_of = dict(zip(files, file_hashes(files), strict=True))
    return {
        source: hash_of[source] if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
        for source in distinct
    }


def file_key(path: Path) -> Key:
    """A file's resolved path and its version. Raises OSError."""
    return str(path.resolve()), *file_version(path)


def open_cache(table: str) -> sqlite3.Connection:
    """The user's cache of facts about files, with `table`; in memory where it cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        cache = sqlite3.connect(folder / "hashes.sqlite3", timeout=5)
        _make_table(cache, table)
    except (OSError, sqlite3.Error):
        cache = sqlite3.connect(":memory:")
        _make_table(cache, table)
    return cache


def _make_table(cache: sqlite3.Connection, table: str) -> None:
    with cache:
        cache.execute(f"CREATE TABLE IF NOT EXISTS {table}")


def _look_up(cache: sqlite3.Connection, key: Key) -> str | None:
    found = cache.execute(
        "SELECT sha256 FROM file_hashes WHERE path = ? AND size = ? AND changed = ? AND status_changed = ?", _row(key)
    ).fetchone()
    return None if found is None else str(found[0])


def _row(key: Key) -> tuple[bytes, int, int, int]:
    """The key as it is stored: a file name need not be text."""
    path, size, changed, status_changed = key
    return os.fsencode(path), size, changed, status_changed


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
