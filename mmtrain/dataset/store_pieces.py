"""An encoding under way, as pieces: stores of a few million tokens each, which together have the records from the first
on without a gap. An encoding that was interrupted resumes after the last piece."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmtrain.atomic_files import replacing
from mmtrain.dataset.encoded_chunk import EncodedChunk, join_chunks
from mmtrain.dataset.store_file import EncodedStore, write_chunk, writing

_TOKENS = 2**22
_SECONDS = 60.0
"""A piece is finished when it has so many tokens or took so long: an interruption costs no more than that."""


def finished_pieces(folder: Path, tick: Callable[[], None]) -> list[EncodedStore]:
    """The pieces in `folder` up to the first that is missing or damaged, or has an image that has changed. That one and
    all after it are deleted."""
    found: list[EncodedStore] = []
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, ValueError):
            piece = EncodedStore(path) if path == _path(folder, found) else None
            if piece is not None and piece.is_current(tick):
                found.append(piece)
                continue
        path.unlink(missing_ok=True)
    return found


def add_pieces(
    folder: Path, pieces: list[EncodedStore], chunks: Iterable[EncodedChunk], advance: Callable[[int], None]
) -> None:
    """Add `chunks`, which follow the `pieces` that are finished, to them and to `folder`. `advance` is given the number
    of records of each chunk. Raises CannotWriteError."""
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
    for together in _grouped(chunks, advance):
        path = _path(folder, pieces)
        with writing(), replacing(path, durable=False) as made:  # damage is noticed when it is opened
            write_chunk(made, join_chunks(together))
        pieces.append(EncodedStore(path))


def _grouped(chunks: Iterable[EncodedChunk], advance: Callable[[int], None]) -> Iterator[Sequence[EncodedChunk]]:
    group: list[EncodedChunk] = []
    started = time.monotonic()
    for chunk in chunks:
        group.append(chunk)
        advance(len(np.unique(chunk.records)))
        if sum(len(one.ids) for one in group) >= _TOKENS or time.monotonic() - started >= _SECONDS:
            yield group
            group, started = [], time.monotonic()
    if group:
        yield group


def _path(folder: Path, pieces: Sequence[EncodedStore]) -> Path:
    """Of the piece after `pieces`."""
    return folder / f"{pieces[-1].num_records if pieces else 0:010d}.safetensors"
