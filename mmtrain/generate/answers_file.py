"""A file of answers that can be continued: one JSON object a line, each flushed to the disk as its batch is done."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError, storage_faults
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import visible

Row = dict[str, Any]


class AnswersFile:
    """The answers at `path`, which are all made in one way: `made_with` names it, and stands in every row."""

    def __init__(self, path: Path, made_with: str) -> None:
        """A line that was being written when the command was stopped is removed.

        Raises UserError where the file has other rows than those of an answers file that was made so.
        """
        self._path, self._made_with = path, made_with
        self._name = visible(str(path))
        self.done: set[int] = set()
        """The numbers of the questions that have a row."""
        with storage_faults(f"{self._name}: it cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        with open_regular(self._path) as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            self.done.add(self._number(line, number))
        if len(whole) < len(content):
            with storage_faults(f"{self._name}: it cannot be written"), self._path.open("r+b") as changed:
                changed.truncate(len(whole))

    def _number(self, line: bytes, number: int) -> int:
        """The number of the question of a row."""
        where = f"{self._name}:{number}"
        try:
            row = json.loads(line)
            question, made_with = row["question_index"], row["made_with"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where}: not a row of answers: name another file with -o") from None
        if made_with != self._made_with:
            raise UserError(
                f"{where}: made with another model, data or options: delete the file or name another one with -o"
            )
        if type(question) is not int or question in self.done:
            raise UserError(f"{where}: question {question} is there twice: delete the file or name another one with -o")
        return question

    def add(self, rows: Iterable[Row]) -> int:
        """Append the rows, by their `question_index`, that are not there yet, and give their number. Raises
        StorageError."""
        fresh = [row for row in rows if row["question_index"] not in self.done]
        with storage_faults(f"{self._name}: it cannot be written"), self._path.open("a", encoding="utf-8") as file:
            for row in fresh:
                file.write(json.dumps({**row, "made_with": self._made_with}, ensure_ascii=False) + "\n")
        self.done |= {row["question_index"] for row in fresh}
        return len(fresh)
