"""Parquet and Arrow files, read with pyarrow."""

import importlib
import itertools
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.sources.place import Place
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, visible

_BATCH_BYTES, _BUFFER_BYTES = 2**22, 2**20
_MAX_ROWS = 4096
"""Of a batch: the rows that are read at once."""


_AHEAD_ROWS, _AHEAD_BYTES = 32, 2**15


class _Recent:
    """What was read last, by all files together, up to a total size."""

    def __init__(self, max_size: int) -> None:
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._max_size = self._room = max_size
        self._lock = threading.Lock()

    def limit(self, max_size: int) -> None:
        """Keep at most that much from the next `put` on."""
        with self._lock:
            self._room += max_size - self._max_size
            self._max_size = max_size

    def take(self, key: Hashable) -> Any:
        """What was put under `key` and is no longer there then, None if there is nothing."""
        with self._lock:
            value, size = self._found.pop(key, (None, 0))
            self._room += size
            return value

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep `value` in the place of the oldest ones, at least until the next call."""
        self.take(key)
        with self._lock:
            self._found[key] = value, size
            self._room -= size
            while self._room < 0 and len(self._found) > 1:
                _, (_, oldest) = self._found.popitem(last=False)
                self._room += oldest


class _RowsAhead:
    """The rows of a table as objects. Where they are read in their order, some are made at once: each takes a tenth of
    the time then."""

    def __init__(self, row_bytes: int, schema: Any) -> None:
        has_maps = any(kind in str(schema) for kind in ("map<", "extension<"))
        self._maps = "strict" if has_maps else None  # which takes ten times as long also where there are none
        self._count = min(_AHEAD_ROWS, max(1, _AHEAD_BYTES // max(1, row_bytes)))
        self._last, self._made = -2, dict[int, Any]()
        self._lock = threading.Lock()

    def row(self, index: int, rows: Callable[[int, int], Any]) -> Any:
        """The row `index` of a table of which `rows(index, count)` is a slice. Raises SampleError if it cannot be
        read."""
        try:
            with self._lock:  # the reader of a file is not made for threads
                if index not in self._made:
                    self._made = self._make(index, rows)
                self._last = index
                return self._made.pop(index)
        except Exception as error:
            raise SampleError(f"cannot be read: {one_line(error)}") from None

    def _make(self, index: int, rows: Callable[[int, int], Any]) -> dict[int, Any]:
        if index == self._last + 1:
            with suppress(Exception):  # of a row that follows
                return dict(enumerate(self._objects(rows(index, self._count)), index))
        return {index: self._objects(rows(index, 1))[0]}

    def _objects(self, table: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts=self._maps)
        if len(rows[0]) != table.num_columns:
            raise ValueError("two columns have the same name")
        return rows


_BATCHES = _Recent(2**27)
"""128 MiB of rows, in each process."""
_READERS = _Recent(16)
"""Readers that are in the middle of a row group: (the number of the next batch, the reader)."""
_NUMBERS = itertools.count()


def read_in_order() -> None:
    """For a process that reads rows in their order: 16 MiB of them stay in memory."""
    _BATCHES.limit(2**24)


class ParquetFile:
    """The rows of a parquet file. A row group is read in batches, from its beginning up to the one that is needed; the
    last batches stay in memory, and a reader stays where it is."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError if it is not parquet, or pyarrow is missing."""
        self.path = path
        open_regular(path).close()
        parquet = _pyarrow(path, "pyarrow.parquet")
        try:
            self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
            self._ends = list(accumulate(group.num_rows for group in groups))
            row_bytes = sum(group.total_byte_size for group in groups) // max(1, len(self))
        except Exception as error:  # a broken file raises anything, also from the parser of its schema
            raise _broken(path, "parquet", error) from None
        self._num_rows = min(max(1, _BATCH_BYTES // max(1, row_bytes)), _MAX_ROWS)
        self._ahead = _RowsAhead(row_bytes, self._file.schema_arrow)
        self._number = next(_NUMBERS)
        self._unreadable: dict[int, tuple[int, Exception]] = {}
        """By row group, the first batch that cannot be read, and why."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def row_groups(self) -> list[range]:
        """The rows of each row group, by index."""
        return [range(start, end) for start, end in pairwise([0, *self._ends])]

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=str(index + 1))

    def record(self, index: int) -> Any:
        """The row as an object. Raises SampleError if it cannot be read."""
        return self._ahead.row(index, self._rows)

    def _rows(self, index: int, count: int) -> Any:
        """At most `count` rows of a batch from `index` on."""
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        number, row = divmod(index - start, self._num_rows)
        return self._batch(group, number, min(self._num_rows, self._ends[group] - index + row)).slice(row, count)

    def _batch(self, group: int, number: int, num_rows: int) -> Any:
        """The batch `number` of a row group, which has `num_rows`."""
        key = self._number, group
        found = _BATCHES.take((*key, number))
        if found is None:
            found = self._read(key, number)
        _BATCHES.put((*key, number), found, found.nbytes)
        if len(found) != num_rows:
            raise ValueError(f"{len(found):,} rows where {num_rows:,} were expected")
        return found

    def _read(self, key: tuple[int, int], number: int) -> Any:
        group = key[1]
        broken, why = self._unreadable.get(group, (number + 1, None))
        if why is not None and number >= broken:
            raise why
        at, reader = _READERS.take(key) or (0, None)
        if reader is None or at > number:
            at, reader = 0, self._file.iter_batches(self._num_rows, row_groups=[group], use_threads=False)
        try:
            while at <= number:
                found = next(reader)
                _BATCHES.put((*key, at), found, found.nbytes)
                at += 1
        except Exception as error:
            why = ValueError("the row group ends before it") if isinstance(error, StopIteration) else error
            self._unreadable[group] = at, why
            raise why from None
        _READERS.put(key, (at, reader), 1)
        return found


class ArrowFile:
    """The rows of an Arrow file, mapped into memory: the format of Hugging Face's `save_to_disk`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError if it is not Arrow, or pyarrow is missing."""
        self.path = path
        open_regular(path).close()
        pyarrow: Any = _pyarrow(path, "pyarrow")
        ipc: Any = _pyarrow(path, "pyarrow.ipc")
        try:
            content = pyarrow.memory_map(str(path))
            is_file = content.read(6) == b"ARROW1"
            content.seek(0)
            self._table = (ipc.open_file if is_file else ipc.open_stream)(content).read_all()
            self._table.validate(full=True)  # without it a broken offset ends the process when its row is read
            self._ahead = _RowsAhead(self._table.nbytes // max(1, len(self)), self._table.schema)
        except Exception as error:  # as for parquet
            raise _broken(path, "Arrow", error) from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=str(index + 1))

    def record(self, index: int) -> Any:
        """The row as an object. Raises SampleError if it cannot be read."""
        return self._ahead.row(index, self._table.slice)


def _pyarrow(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{visible(str(path))}: reading {path.suffix} files needs pyarrow: pip install 'mmtrain[parquet]'"
        ) from None


def _broken(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{visible(str(path))}: not a whole {kind} file: {one_line(error)}")
