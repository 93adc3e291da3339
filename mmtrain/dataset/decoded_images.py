"""Every image decoded once before the first step: a file can be broken in the middle, its header and end being sound.

Which bytes decoded is kept in the user's cache by their SHA-256, so the same image costs a look-up from then on.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import PIL

from mmtrain.dataset.hashes import file_hashes, open_cache
from mmtrain.encoding.images import FoundImage, decode
from mmtrain.records.chat import SampleError

_TABLE = "decoded (sha256 TEXT, pillow TEXT, width INTEGER, height INTEGER, PRIMARY KEY (sha256, pillow))"
_Row = tuple[str, str, int, int]


def images_that_fail(pictures: Iterable[FoundImage], num_threads: int) -> dict[Path | bytes, str]:
    """By source, why an image does not decode to the size that its header says."""
    by_source = {picture.source: picture for picture in pictures}
    rows = {source: (own, PIL.__version__, *by_source[source].size) for source, own in _hashes(list(by_source)).items()}
    with closing(open_cache(_TABLE)) as cache, ThreadPoolExecutor(num_threads) as pool:
        new = [
            picture for source, picture in by_source.items() if source not in rows or not _is_known(cache, rows[source])
        ]
        reasons = dict(zip([picture.source for picture in new], pool.map(_reason, new), strict=True))
        with suppress(sqlite3.Error), cache:  # a cache that cannot be written costs time, no more
            sound = [rows[source] for source, reason in reasons.items() if reason is None and source in rows]
            cache.executemany("INSERT OR IGNORE INTO decoded VALUES (?, ?, ?, ?)", sound)
    return {source: reason for source, reason in reasons.items() if reason is not None}


def _hashes(sources: Sequence[Path | bytes]) -> dict[Path | bytes, str]:
    """Of each source but files that cannot be read."""
    found: dict[Path | bytes, str] = {
        data: hashlib.sha256(data).hexdigest() for data in sources if isinstance(data, bytes)
    }
    files = [path for path in sources if isinstance(path, Path)]
    with suppress(OSError):  # one has gone meanwhile: decoding says which
        found |= dict(zip(files, file_hashes(files), strict=True))
    return found


def _is_known(cache: sqlite3.Connection, row: _Row) -> bool:
    where = "sha256 = ? AND pillow = ? AND width = ? AND height = ?"
    return cache.execute(f"SELECT 1 FROM decoded WHERE {where}", row).fetchone() is not None


def _reason(picture: FoundImage) -> str | None:
    try:
        decode(picture)
    except SampleError as error:
        return str(error)
    return None
