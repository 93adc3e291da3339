"""Parquet and Arrow files, read with pyarrow."""

import functools
import importlib
import threading
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.sources.place import Place
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, visible

_NUM_GROUPS = 8
"""Row groups of a file that stay in memory."""


class ParquetFile:
    """The rows of a parquet file. A row group is read at once, and the last few stay in memory."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError if it is not parquet, or pyarrow is missing."""
        self.path = path
        open_regular(path).close()
        parquet = _pyarrow(path, "pyarrow.parquet")
        try:
            self._file = parquet.ParquetFile(path)
            groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        except Exception as error:  # a broken file raises anything, also from the parser of its schema
            raise _broken(path, "parquet", error) from None
        self._ends = list(accumulate(groups))
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=_NUM_GROUPS)(self._file.read_row_group)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def row_groups(self) -> list[range]:
        """The rows of each row group, by index."""
        return [range(start, end) for start, end in pairwise([0, *self._ends])]

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=str(index + 1))

    def record(self, index: int) -> Any:
        """The row as an object. Raises SampleError if its row group cannot be read."""
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        try:
            with self._lock:  # the reader of a file is not made for threads
                table = self._group(group)
            return _row(table, index - start)
        except Exception as error:
            raise SampleError(f"cannot be read: {one_line(error)}") from None


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
        except Exception as error:  # as for parquet
            raise _broken(path, "Arrow", error) from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=str(index + 1))

    def record(self, index: int) -> Any:
        """The row as an object. Raises SampleError if it cannot be read."""
        try:
            return _row(self._table, index)
        except Exception as error:
            raise SampleError(f"cannot be read: {one_line(error)}") from None


def _row(table: Any, index: int) -> dict[str, Any]:
    (row,) = table.slice(index, 1).to_pylist()
    if len(row) != table.num_columns:
        raise ValueError("two columns have the same name")
    return dict(row)


def _pyarrow(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{visible(str(path))}: reading {path.suffix} files needs pyarrow: pip install 'mmtrain[parquet]'"
        ) from None


def _broken(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{visible(str(path))}: not a whole {kind} file: {one_line(error)}")
