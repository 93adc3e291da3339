"""Decodes every image once before the first step: a file can be broken in the middle and have a sound header and end.

The SHA-256 of each image that decodes is stored in the user's cache, so the same image is not decoded again.
"""

import sqlite3
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import PIL

from mmtrain.dataset.hashes import image_hashes, open_cache
from mmtrain.encoding.images import FoundImage, decode
from mmtrain.records.chat import SampleError

_TABLE = "decoded (sha256 TEXT, pillow TEXT, width INTEGER, height INTEGER, PRIMARY KEY (sha256, pillow))"
_Row = tuple[str, str, int, int]


def images_that_fail(images: Iterable[FoundImage], num_threads: int) -> dict[Path | bytes, str]:
    """By source, why an image does not decode to the size that its header says."""
    by_source = {image.source: image for image in images}
    if not by_source:
        return {}
    rows: dict[Path | bytes, _Row] = {}
    with suppress(OSError):  # one has just been deleted: decoding says which
        rows = {
            source: (own, PIL.__version__, *by_source[source].size) for source, own in image_hashes(by_source).items()
        }
    with closing(open_cache(_TABLE)) as cache, ThreadPoolExecutor(num_threads) as pool:
        new = [image for source, image in by_source.items() if source not in rows or not _is_known(cache, rows[source])]
        reasons = dict(zip([image.source for image in new], pool.map(_reason, new), strict=True))
        with suppress(sqlite3.Error), cache:  # a cache that cannot be written only costs time
            sound = [rows[source] for source, reason in reasons.items() if reason is None and source in rows]
            cache.executemany("INSERT OR IGNORE INTO decoded VALUES (?, ?, ?, ?)", sound)
    return {source: reason for source, reason in reasons.items() if reason is not None}


def _is_known(cache: sqlite3.Connection, row: _Row) -> bool:
    where = "sha256 = ? AND pillow = ? AND width = ? AND height = ?"
    return cache.execute(f"SELECT 1 FROM decoded WHERE {where}", row).fetchone() is not None


def _reason(image: FoundImage) -> str | None:
    """Why an image does not decode, None where it does."""
    try:
        decode(image)
    except SampleError as error:
        return str(error)
    return None
