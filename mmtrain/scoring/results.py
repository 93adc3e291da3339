"""How the commands of `mmtrain eval` give their figures: printed, as JSON, or as a page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtrain.command_output import page_environment, plain_console, print_json, write_page
from mmtrain.safe_text import visible


def show(
    row: Any,
    as_json: bool,
    print_report: Callable[[Any, Console], None],
    path: Path | None = None,
    page_of: Callable[[Any], str] | None = None,
) -> None:
    """Print `row`, and write its page where there is a `path`. Raises StorageError."""
    if path is not None and page_of is not None:
        write_page(path, page_of(row))
    if as_json:
        print_json(row)
        return
    print_report(row, plain_console())
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
    return page_environment(package, "mmtrain.scoring").get_template("page.html").render(**values)
