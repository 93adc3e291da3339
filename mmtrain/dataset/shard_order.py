"""The order in which a stream reads records: the files in random order, a window of records at a time.

It follows from the seed, the names of the files and the number of records in each. A file is opened when it is its
turn; the rows of a parquet file are read by row group, in random order.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.dataset.plan import Indices, permutation
from mmtrain.errors import UserError
from mmtrain.records.data_files import find_data_files
from mmtrain.records.record_set import OpenFile
from mmtrain.records.sources.arrow import ParquetFile
from mmtrain.records.sources.open import open_file
from mmtrain.safe_text import counted, visible

_MAX_FILES = 64
"""Files of one window: each is open while samples of the window are in use."""
_GROUPS = 2**31


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream continues."""

    epoch: int = 0
    file: int = 0
    """Files that were read to their end in this epoch."""
    record: int = 0
    """Records that were read of the next file."""
    window: int = 0
    """Windows that were read in this epoch."""


@dataclass(frozen=True, slots=True)
class Window:
    """Records that are read together."""

    start: Position
    end: Position
    files: tuple[OpenFile, ...]
    records: Indices
    """Their numbers in the record set of `files`."""


class ShardOrder:
    """The files of some sources in windows of at most `size` records."""

    def __init__(self, sources: Sequence[Source], seed: int, size: int) -> None:
        """Raises UserError where a source names no file, or one that is not read."""
        self._seed, self._size, self._sources = seed, size, sources
        self._files = [
            (path, number) for number, spec in enumerate(sources) for path in find_data_files(spec.path, spec.split)
        ]
        self._opened = functools.lru_cache(maxsize=1)(self._open)

    def __len__(self) -> int:
        """The number of files."""
        return len(self._files)

    @property
    def first(self) -> tuple[Path, int]:
        """The first file in which there are records, and its source; the first of all where there are none."""
        files = [self._files[number] for number in permutation(len(self._files), self._seed, 0, 0)]
        return next(((path, source) for path, source in files if len(open_file(path))), files[0])

    def files_of(self, source: int) -> list[Path]:
        """The files of one source, in the order of their names."""
        return [path for path, number in self._files if number == source]

    def windows(self, position: Position) -> Iterator[Window]:
        """From `position` on, without end. Raises UserError where a file cannot be read, or there are no records."""
        while True:
            window = self._window(position)
            if len(window.records):
                yield window
            elif window.start == Position(window.start.epoch):
                names = ", ".join(visible(source.path) for source in self._sources)
                raise UserError(f"data.train: there are no records in {names}")
            position = window.end

    def _window(self, start: Position) -> Window:
        order = permutation(len(self._files), self._seed, start.epoch, 0)
        file, record, room, base = start.file, start.record, self._size, 0
        files: list[OpenFile] = []
        records: list[Indices] = [np.zeros(0, np.int64)]
        while room and file < len(order) and len(files) < _MAX_FILES:
            opened, rows = self._opened(int(order[file]), start.epoch)
            taken = rows[record : record + room]
            if len(taken):
                files.append(opened)
                records.append(base + taken)
                base += len(rows)
            room, record = room - len(taken), record + len(taken)
            if record >= len(rows):
                file, record = file + 1, 0
        is_over = file >= len(order)  # beyond it where files are gone and that was accepted
        end = Position(start.epoch + 1) if is_over else Position(start.epoch, file, record, start.window + 1)
        return Window(start, end, tuple(files), np.concatenate(records))

    def _open(self, number: int, epoch: int) -> tuple[OpenFile, Indices]:
        """A file, and its records in the order in which they are read in an epoch."""
        path, source = self._files[number]
        records = open_file(path)
        opened = OpenFile(records, self._sources[source], source)
        if not isinstance(records, ParquetFile):
            return opened, np.arange(len(records))
        groups = [np.arange(rows.start, rows.stop) for rows in records.row_groups]
        order = permutation(len(groups), self._seed, epoch, _GROUPS + number)
        return opened, np.concatenate([np.zeros(0, np.int64), *(groups[group] for group in order)])


def first_file(config: Config, say: Callable[[str], None]) -> Config:
    """For commands that look at training data: with `data.streaming` a config that has only the first file, without
    streaming; `say` is given the line that says so."""
    if config.data.streaming is None:
        return config
    order = ShardOrder(config.data.train, config.train.seed, config.data.streaming.window)
    path, source = order.first
    say(f"data.streaming: of {counted(len(order), 'file')} only the first one is looked at, {visible(str(path))}")
    alone = config.data.train[source].model_copy(update={"path": str(path), "split": None})
    return config.model_copy(update={"data": config.data.model_copy(update={"train": (alone,), "streaming": None})})
