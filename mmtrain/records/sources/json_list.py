"""A file that is one JSON list of records."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.json_text import DECODER, MAX_RECORD, too_long
from mmtrain.records.sources.compressed import open_plain
from mmtrain.records.sources.place import Place
from mmtrain.safe_text import visible


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


def _list_items(path: Path) -> Iterator[tuple[Any, int]]:
    """Each item of the JSON list in `path`, with its first line (from 1). Raises UserError and OSError."""
    name = visible(str(path))
    with open_plain(path) as file:
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
            record, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise UserError(f"{name}:{line}: not JSON: {error}") from None
        except RecursionError:
            raise UserError(f"{name}:{line}: not JSON that can be read: nested too deeply") from None
        if at - start > MAX_RECORD:
            raise UserError(f"{name}:{line}: {too_long(at - start, 'characters')}")
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
