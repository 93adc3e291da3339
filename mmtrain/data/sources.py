"""Files, folders and globs of records, with random access and the line of every record.

A JSONL file costs sixteen bytes a record in memory, whatever its size: only the offsets of its lines are kept.
"""

import functools
import glob
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.data.chat import SampleError
from mmtrain.errors import UserError
from mmtrain.foreign_text import shown, visible


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: said in every message about it."""

    file: Path
    line: int
    item: int | None = None
    """Counted from 1, where several records of a list share a line."""

    def __str__(self) -> str:
        return f"{visible(str(self.file))}:{self.line}" + (f" item {self.item}" if self.item is not None else "")


class JsonlFile:
    """A file with one JSON value on each line, read by byte offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("Q")
        self._lines = array("L")
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    offset, line = 3, line[3:]
                if not line.isspace():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
            self._end = offset

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> Place:
        return Place(self.path, self._lines[index])

    def record(self, index: int) -> Any:
        """The parsed record. Raises SampleError where the line is not JSON."""
        start = self._offsets[index]
        end = self._offsets[index + 1] if index + 1 < len(self._offsets) else self._end
        opened = _opened(self)  # held while it is read from: two threads may open at once, and one of them is dropped
        return parse_json(os.pread(opened.number, end - start, start))


class _Descriptor:
    """A file that is open for reading as long as this lives."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@functools.lru_cache(maxsize=64)
def _opened(file: JsonlFile) -> _Descriptor:
    """Of a file of records that is read from: opening it for every record takes as long as parsing one."""
    return _Descriptor(file.path)


class JsonFile:
    """A file that is one JSON list of records, read whole."""

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

    Raises UserError where there is none, or where one is neither .json nor .jsonl.
    """
    files = [_open(file) for file in _expand(path)]
    if not any(len(file) for file in files):
        raise UserError(f"{path}: there are no records in it")
    return files


def _expand(path: str) -> list[Path]:
    here = Path(path)
    if here.is_dir():
        found = sorted(file for file in here.iterdir() if file.suffix in (".json", ".jsonl"))
    elif here.exists():
        found = [here]
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"{path}: there is no .json or .jsonl file")
    return found


def _open(path: Path) -> RecordFile:
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: expected a .json or .jsonl file")
    try:
        return JsonlFile(path) if path.suffix == ".jsonl" else JsonFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json(line: bytes) -> Any:
    """One JSON value; equal keys, NaN and deep nesting, which Python takes, are refused. Raises SampleError."""
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
    """Each item of the JSON list in `path`, with the line (from 1) it begins on. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}:1: not UTF-8 text") from None
    at, line, counted = _skip(text, 0), 1, 0
    if not text.startswith("[", at):
        raise UserError(f"{path}:1: expected a JSON list of records; a file with one record on each line is .jsonl")
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        try:
            record, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise UserError(f"{path}:{line}: not JSON: {error}") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: not JSON that can be read: nested too deeply") from None
        yield record, line
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise UserError(
                    f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON: a comma before the end of the list"
                )
        elif not text.startswith("]", at):
            raise UserError(f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON: expected ',' or ']' between records")
    at = _skip(text, at + 1)
    if at < len(text):
        raise UserError(f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON: there is more behind the list")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
