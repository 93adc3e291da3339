"""How the commands of `mmtrain eval` give their figures: printed, as JSON, or as a page."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from mmtrain.errors import UserError, storage_faults
from mmtrain.safe_text import shown, visible


def check_page(path: Path | None) -> None:
    """Raises UserError, before anything is computed, where a page cannot be written to `path`."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--html {shown(path)}: expected the name of a file in a folder that exists")


def show(
    row: Any,
    as_json: bool,
    print_report: Callable[[Any, Console], None],
    path: Path | None = None,
    write_page: Callable[[Path], None] | None = None,
) -> None:
    """Print `row`, and write its page where there is a `path`. Raises StorageError."""
    if path is not None and write_page is not None:
        with storage_faults(f"--html {shown(path)}: it cannot be written"):
            write_page(path)
    if as_json:
        print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        return
    print_report(row, Console(highlight=False, emoji=False, markup=False))
    if path is not None:
        print(f"\nwrote {visible(str(path))}")


def figure_table(name: str, *numbers: str) -> Table:
    """A table without lines; numbers that are too wide continue in the next line, so that no digit is lost."""
    table = Table(box=None, pad_edge=False)
    table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", overflow="fold")
    return table


def say(line: str, console: Console, wrap: bool = False) -> None:
    """Print a line as it is; where it is longer than the terminal, only `wrap` breaks it between words."""
    console.print(line, markup=False, highlight=False, soft_wrap=not wrap)


def render(package: str, **values: Any) -> str:
    """The page.html of a package, which extends results.html. All text is escaped."""

    def load(name: str) -> str:
        return resources.files(__package__ if name == "results.html" else package).joinpath(name).read_text("utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(load)
    )
    return environment.get_template("page.html").render(**values)
