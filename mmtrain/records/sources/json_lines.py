"""A file with one JSON value on each line."""

import itertools
import os
import re
from pathlib import Path
from typing import Any

from mmtrain.records.chat import SampleError
from mmtrain.records.json_text import MAX_RECORD, parse_json
from mmtrain.records.sources.compressed import open_plain
from mmtrain.records.sources.line_index import LineIndex
from mmtrain.records.sources.place import Place


class JsonlFile:
    """A file with one JSON value on each line, read by byte offset."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError for a compressed file that is broken."""
        self.path = path
        self._index = LineIndex(path, "lines 1")

    def __len__(self) -> int:
        return len(self._index)

    def place(self, index: int) -> Place:
        return Place(self.path, self._index.lines[index])

    def record(self, index: int) -> Any:
        """The parsed record. Raises SampleError if the line is too long or not JSON."""
        return parse_json(self._index.content(index))


_TAIL = 4096
_BEGINS_A_LIST = re.compile(rb"\s*\[\s*(\{|$)")


def has_json_lines(path: Path) -> bool:
    """Whether a file named as one of a list has a record on each line, as `to_json` of `datasets` writes it.

    Raises OSError and UserError.
    """
    with open_plain(path) as file:
        first = file.readline(MAX_RECORD).removeprefix(b"\xef\xbb\xbf")
    try:
        return first.startswith(b"{") and bool(parse_json(first))
    except SampleError:
        return False


def is_json_list(path: Path) -> bool:
    """Whether a file named as one of lines is one JSON list of objects, or an object over several lines. Raises OSError
    and UserError.

    A list on the first of several lines is a record: a conversation as a bare list of messages.
    """
    with open_plain(path) as file:
        first = file.readline(MAX_RECORD).removeprefix(b"\xef\xbb\xbf")
        if first.strip() == b"{":
            return True
        if not _BEGINS_A_LIST.match(first):
            return False
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        if not file.read().rstrip().endswith(b"]"):
            return False
        file.seek(0)
        is_one_line = not any(not line.isspace() for line in itertools.islice(file, 1, None))
    try:
        found = parse_json(first)
    except SampleError:
        return not is_one_line
    is_turns = isinstance(found, list) and all(isinstance(turn, dict) and "role" in turn for turn in found)
    return is_one_line and not is_turns
