"""Files of records with random access, and the line of every record.

A JSONL file takes sixteen bytes of memory per record, whatever its size: only the offsets of its lines are stored.
"""

import functools
import itertools
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.data_files import find_data_files
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import shown, visible

MAX_RECORD = 32 * 2**20
"""The most bytes of one record. Parsing takes up to 30 times as much memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """The file and line of a record, for every message about it."""

    file: Path
    line: int
    item: int | None = None
    """Counted from 1, if several records of a list are on the same line."""

    def __str__(self) -> str:
        return f"{visible(str(self.file))}:{self.line}" + (f" item {self.item}" if self.item is not None else "")


class JsonlFile:
    """A file with one JSON value on each line, read by byte offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("Q")
        self._lines = array("L")
        with open_regular(path) as file:
            offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(offset)
            for number in itertools.count(1):
                start, is_blank = offset, True
                while chunk := file.readline(MAX_RECORD):  # the whole line, unless it is too long
                    offset += len(chunk)
                    is_blank = is_blank and chunk.isspace()
                    if chunk.endswith(b"\n"):
                        break
                if offset == start:
                    break
                if not is_blank:
                    self._offsets.append(start)
                    self._lines.append(number)
            self._end = offset

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> Place:
        return Place(self.path, self._lines[index])

    def record(self, index: int) -> Any:
        """The parsed record. Raises SampleError if the line is too long or not JSON."""
        start = self._offsets[index]
        end = self._offsets[index + 1] if index + 1 < len(self._offsets) else self._end
        try:
            opened = _opened(self)  # a reference while it is read: if two threads open it, the cache drops one of them
            line = os.pread(opened.file.fileno(), min(end - start, MAX_RECORD + 1), start)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from None
        if len(line) > MAX_RECORD and b"\n" not in line:
            raise _too_long(end - start, "bytes")
        return parse_json(line)


class _Descriptor:
    """A file that is open for reading as long as this object exists."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


@functools.lru_cache(maxsize=64)
def _opened(file: JsonlFile) -> _Descriptor:
    """The open file, cached: opening it for every record would take as long as parsing the record."""
    return _Descriptor(open_regular(file.path))


class JsonFile:
    """A file that is one JSON list of records, read completely into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[Any] = []
        self._lines = array("L")
        for record, line in _list_items(path):
            self._records.append(record)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._records)

    def place(self, index: int) -> Place:
        line = self._lines[index]
        shares_line = line in (*self._lines[max(0, index - 1) : index], *self._lines[index + 1 : index + 2])
        return Place(self.path, line, index + 1 if shares_line else None)

    def record(self, index: int) -> Any:
        return self._records[index]


RecordFile = JsonlFile | JsonFile


def open_records(path: str) -> list[RecordFile]:
    """The record files that `path` names: a file, a folder or a glob, in the order of their names.

    Raises UserError if there is none, if one cannot be read, or if a file of the folder would be left out.
    """
    files = [_open(file) for file in find_data_files(path)]
    if not any(len(file) for file in files):
        raise UserError(f"{visible(path)}: there are no records in it")
    return files


def _open(path: Path) -> RecordFile:
    try:
        return JsonlFile(path) if path.suffix.lower() == ".jsonl" else JsonFile(path)
    except OSError as error:
        raise UserError(f"{visible(str(path))}: cannot be read: {error.strerror}") from None


def _too_long(length: int, unit: str) -> SampleError:
    return SampleError(
        f"a record of {length:,} {unit}, over the {MAX_RECORD:,} allowed: split it, or give its images by path"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json(line: bytes) -> Any:
    """One JSON value. Raises SampleError also for what Python accepts: equal keys, NaN and very deep nesting."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise SampleError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise SampleError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise SampleError(f"not JSON: {error}") from None
    except RecursionError:
        raise SampleError("not JSON that can be read: nested too deeply") from None


def _list_items(path: Path) -> Iterator[tuple[Any, int]]:
    """Each item of the JSON list in `path`, with its first line (from 1). Raises UserError and OSError."""
    name = visible(str(path))
    with open_regular(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{name}:1: not UTF-8 text") from None
    del content
    at, line, counted = _skip(text, 0), 1, 0
    if not text.startswith("[", at):
        raise UserError(f"{name}:1: expected a JSON list of records; a file with one record on each line is .jsonl")
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = start = at
        try:
            record, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise UserError(f"{name}:{line}: not JSON: {error}") from None
        except RecursionError:
            raise UserError(f"{name}:{line}: not JSON that can be read: nested too deeply") from None
        if at - start > MAX_RECORD:
            raise UserError(f"{name}:{line}: {_too_long(at - start, 'characters')}")
        yield record, line
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise UserError(f"{name}:{_line_of(text, at)}: not JSON: a comma before the end of the list")
        elif not text.startswith("]", at):
            raise UserError(f"{name}:{_line_of(text, at)}: not JSON: expected ',' or ']' between records")
    at = _skip(text, at + 1)
    if at < len(text):
        raise UserError(f"{name}:{_line_of(text, at)}: not JSON: there is more after the list")


def _line_of(text: str, at: int) -> int:
    return 1 + text.count("\n", 0, at)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
