"""A file that is one JSON list of records, or one object after the other, read by their offsets. It is parsed once when
it is opened, some of it at a time, so that a fault is found wherever it is."""

import codecs
import json
from pathlib import Path
from typing import Any, BinaryIO

from mmtrain.errors import UserError
from mmtrain.records.json_text import DECODER, MAX_RECORD, parse_json, too_long
from mmtrain.records.sources.line_index import OffsetIndex, first_offset
from mmtrain.records.sources.place import Place
from mmtrain.safe_text import visible
from mmtrain.text_files import NOT_UTF8

_BLOCK = 2**20
_SPACE = " \t\r\n"
_MARGIN = 4
"""Characters after a number that show that it is whole, as in `1` and `1.5e-3`."""


class JsonFile:
    """A file that is one JSON list of records, read by byte offset."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError with the line of what is wrong."""
        self.path = path
        self._index = _ListIndex(path, "list 1")

    def __len__(self) -> int:
        return len(self._index.offsets)

    def place(self, index: int) -> Place:
        lines = self._index.lines
        line = lines[index]
        shares_line = line in (*lines[max(0, index - 1) : index], *lines[index + 1 : index + 2])
        return Place(self.path, line, index + 1 if shares_line else None)

    def record(self, index: int) -> Any:
        """The parsed record. Raises SampleError if the file has changed."""
        return parse_json(self._index.content(index).rstrip(b" \t\r\n,"))


class _ListIndex(OffsetIndex):
    def _scan(self, file: BinaryIO) -> int:
        text = _Text(file, visible(str(self.path)))
        if (first := text.skip_space()) == "{":
            return self._scan_objects(text)
        if first != "[":
            text.check_utf8(text.characters, is_whole=False)
            raise text.fault("expected a JSON list of records, or one on each line", 1)
        following = text.skip_space(1)
        while following != "]":
            self._add(text.offset, text.line())
            following = text.skip_space(text.value())
            if following == ",":
                following = text.skip_space(1)
                if following == "]":
                    raise text.fault("not JSON: a comma before the end of the list")
            elif following != "]":
                raise text.fault("not JSON: expected ',' or ']' between records")
        end = text.offset
        if text.skip_space(1):
            raise text.fault("not JSON: there is more after the list")
        return end

    def _scan_objects(self, text: "_Text") -> int:
        """Records one after the other, each over several lines; often only one."""
        while following := text.skip_space():
            if following != "{":
                raise text.fault("not JSON: expected an object after the one before it")
            self._add(text.offset, text.line())
            text.skip_space(text.value())
        return text.offset


class _Text:
    """The text of a file, of which only what is being parsed is in memory. Every byte is one character, so that
    positions are offsets; in JSON nothing but the content of texts has other bytes than those of ASCII."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.characters = ""
        self._at = 0
        """Where parsing is, in `characters`."""
        self._start = self._line_start = first_offset(file)
        """The offsets of `characters`, and of the line in which `_counted` is."""
        self._counted, self._line = 0, 1

    @property
    def offset(self) -> int:
        return self._start + self._at

    def line(self, ahead: int = 0) -> int:
        """The number of the line, from 1, of the character so many after the current one."""
        end = self._at + ahead
        passed = self.characters[self._counted : end].replace("\r\n", " \n").replace("\r", "\n")
        if (last := passed.rfind("\n")) >= 0:
            self._line += passed.count("\n")
            self._line_start = self._start + self._counted + last + 1
        self._counted = end
        return self._line

    def skip_space(self, ahead: int = 0) -> str:
        """Move so many characters on, and past white space. Returns the character there, empty at the end."""
        self._at += ahead
        while True:
            while self._at < len(self.characters):
                if self.characters[self._at] not in _SPACE:
                    return self.characters[self._at]
                self._at += 1
            if not self._read():
                return ""

    def value(self) -> int:
        """The length of the value here. Raises UserError if it is not JSON, or too long."""
        while True:
            try:
                _, end = DECODER.raw_decode(self.characters, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                if len(self.characters) - self._at <= MAX_RECORD and self._read():
                    continue
                if error.pos + _MARGIN > len(self.characters) > MAX_RECORD or "Unterminated" in error.msg:
                    raise self.fault(str(too_long(len(self.characters) - self._at))) from None
                line, column = self.line(ahead), 1 + self._num_characters(self._at + ahead)
                raise self.fault(f"not JSON: {error.msg} at column {column}", line) from None
            except ValueError as error:
                raise self.fault(f"not JSON: {self._in_utf8(error)}") from None
            except RecursionError:
                raise self.fault("not JSON that can be read: nested too deeply") from None
            length = end - self._at
            if length > MAX_RECORD:
                raise self.fault(str(too_long(length)))
            if end + _MARGIN <= len(self.characters) or not self._read():
                self.check_utf8(self.characters[self._at : self._at + length])
                return length

    def check_utf8(self, characters: str, is_whole: bool = True) -> None:
        """Raises UserError. `is_whole`: the last character is not cut off."""
        try:
            if not characters.isascii():
                codecs.getincrementaldecoder("utf-8")().decode(characters.encode("latin-1"), is_whole)
        except UnicodeDecodeError:
            raise self.fault(NOT_UTF8) from None

    def fault(self, reason: str, line: int | None = None) -> UserError:
        """`line`: that of the current character if it is None."""
        return UserError(f"{self._name}:{self.line() if line is None else line}: {reason}")

    def _read(self) -> bool:
        """Read more of the file: as much again of what is being parsed. False at its end."""
        ends_line = self._at == len(self.characters) and self.characters.endswith("\r")
        done = self._at - ends_line  # with a "\n" that follows it would be one end of a line
        self.line(-ends_line)
        block = self._file.read(max(_BLOCK, len(self.characters) - self._at))
        self.characters = self.characters[done:] + block.decode("latin-1")
        self._start += done
        self._at, self._counted = self._at - done, 0
        return bool(block)

    def _num_characters(self, end: int) -> int:
        """Those of the line before the position `end`."""
        self._file.seek(self._line_start)
        return len(self._file.read(self._start + end - self._line_start).decode("utf-8", "replace"))

    def _in_utf8(self, error: ValueError) -> ValueError:
        """The error that the value here gives as UTF-8: its text may name a key."""
        try:
            DECODER.raw_decode(self.characters[self._at :].encode("latin-1").decode("utf-8", "replace"))
        except ValueError as named:
            return named
        return error
