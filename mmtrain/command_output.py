"""How commands give what they found besides text: as JSON, and as HTML pages."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from mmtrain.atomic_files import check_writable, write_text
from mmtrain.errors import StorageError, UserError
from mmtrain.safe_text import shown

_MIN_WIDTH = 80
"""Of tables, in columns. A narrower terminal continues their rows in the next line; rich would leave columns out."""


class _PlainConsole(Console):
    """Prints tables without spaces at the ends of lines."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        segments = super().render(renderable, options)
        if not isinstance(renderable, Table):
            yield from segments
            return
        for line in Segment.split_lines(segments):
            while line and not (text := line[-1].text.rstrip()):
                line.pop()
            if line:
                line[-1] = line[-1]._replace(text=text)
            yield from (*line, Segment.line())


def plain_console(stderr: bool = False) -> Console:
    """Prints text as it is: nothing in it is read as markup or highlighted."""
    console = _PlainConsole(stderr=stderr, highlight=False, emoji=False, markup=False)
    console.width = max(console.width, _MIN_WIDTH)
    return console


def print_json(row: Any) -> None:
    """One JSON object on a line. A number that is not finite is null, and what standard output cannot encode, such as
    a file name that is not UTF-8, is escaped."""
    line = json.dumps(row, ensure_ascii=False)
    if "NaN" in line or "Infinity" in line:
        row = json.loads(line, parse_constant=lambda name: None)
        line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    print(line)


def check_page(path: Path | None) -> None:
    """Raises UserError, before anything is computed, where a page cannot be written to `path`."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"--html {shown(path)}: that is a folder: name a file in it")
    if not os.path.isdir(path.absolute().parent):
        raise UserError(f"--html {shown(path)}: there is no folder {shown(path.absolute().parent)}: create it first")
    if _is_replaced(path):
        check_writable(path, f"--html {shown(path)}")


def page_environment(*packages: str) -> Environment:
    """Loads templates from the files of these packages, and base.html. All text is escaped; an unknown name is an
    error."""
    loader = ChoiceLoader([PackageLoader(package, "") for package in (*packages, "mmtrain")])
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)


def write_page(path: Path, page: str) -> None:
    """Write what `--html` asks for. Raises StorageError."""
    try:
        if _is_replaced(path):
            write_text(path.resolve(), page, durable=False)
        else:
            path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise StorageError(f"--html {shown(path)}: it cannot be written: {error.strerror}") from None


def _is_replaced(path: Path) -> bool:
    """Whether `path` is a file or not there. Something else, such as /dev/stdout, is written to."""
    return os.path.isfile(path) or not os.path.exists(path)
