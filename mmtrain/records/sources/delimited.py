"""Tables of text: CSV and TSV, the names of the columns in the first row.

A .csv file whose first row has no comma is separated by what that row has: `;`, `|` or a tab. Where a space follows
every separator of the first row, it belongs to the separators. A first column without a name is the numbers of rows
that pandas writes."""

import csv
import io
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError, refused_at
from mmtrain.records.json_text import MAX_RECORD
from mmtrain.records.record_keys import is_image
from mmtrain.records.sources.line_index import LineIndex
from mmtrain.records.sources.place import Place
from mmtrain.safe_text import one_line, shown, visible
from mmtrain.text_files import NOT_UTF8


class DelimitedFile:
    """Each row as an object of texts, read by byte offset. A quoted field may have newlines, as in RFC 4180."""

    def __init__(self, path: Path, delimiter: str) -> None:
        """Raises OSError, and UserError if the first row does not name the columns."""
        self.path = path
        csv.field_size_limit(MAX_RECORD)
        self._index = LineIndex(path, "rows 1", lambda chunk: chunk.count(b'"') % 2 == 1)
        self._style: dict[str, Any] = {"delimiter": delimiter, "strict": True}
        with refused_at(f"{visible(str(path))}:1"):
            self._columns = self._row(0) if len(self._index) else []
            if len(self._columns) == 1 and delimiter == ",":
                self._style["delimiter"] = next((one for one in ";|\t" if one in self._columns[0]), delimiter)
                self._columns = self._row(0)
            if len(self._columns) > 1 and all(name.startswith(" ") for name in self._columns[1:]):
                self._style["skipinitialspace"] = True
                self._columns = self._row(0)
        columns = self._columns
        if values := [name for name in columns if is_image(name) or "://" in name]:
            raise UserError(
                f"{visible(str(path))}:1: the first row must name the columns, found {shown(values[0])}: add a row of "
                "names above it, such as image and caption"
            )
        repeated = {name for n, name in enumerate(columns) if columns.count(name) > 1 or (n and not name.strip())}
        if repeated or (len(self._index) and not self._columns):
            found = ", ".join(map(shown, sorted(repeated)))
            raise UserError(f"{visible(str(path))}:1: the first row must name every column once, found {found} again")

    def __len__(self) -> int:
        return max(0, len(self._index) - 1)

    def place(self, index: int) -> Place:
        return Place(self.path, self._index.lines[index + 1])

    def record(self, index: int) -> Any:
        """An empty field is left out. Raises SampleError if the row does not have the columns of the first."""
        row = self._row(index + 1)
        if len(row) != len(self._columns):
            raise SampleError(f"{len(row)} fields, expected {len(self._columns)} as in the first row")
        return {name: value for name, value in zip(self._columns, row, strict=True) if value}

    def _row(self, index: int) -> list[str]:
        try:
            text = self._index.content(index).decode("utf-8")
            rows = list(csv.reader(io.StringIO(text, newline=""), **self._style))
        except UnicodeDecodeError:
            raise SampleError(NOT_UTF8) from None
        except csv.Error as error:
            raise SampleError(f"not a row of a table: {one_line(error)}") from None
        rows = [row for row in rows if row]
        if len(rows) != 1:
            raise SampleError(
                f"not a row of a table: a quote in it makes it {len(rows)} rows: put a field with one in quotes, and "
                'the quote twice, as in "a 5"" disk"'
            )
        return rows[0]
