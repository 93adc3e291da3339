"""A step of contrastive training in the terminal, in 80 columns."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from mmtrain.inspect_labels.pair_step import CELLS, PairStep, columns_shown, summary_lines
from mmtrain.safe_text import path_end, shortened, visible

SIGNS = {"positive": "+", "negative": "·", "neither": "="}
_STYLES = {"positive": "bold green", "negative": "dim", "neither": "yellow"}
_MARGIN, _MOST_COLUMNS = 7, 72
LEGEND = "+ positive   · negative   = neither: the query itself, or of its group"


def print_step(step: PairStep, rows: Sequence[int], console: Console) -> None:
    """Print the matrix of these rows, then each query with its positives and what is left out."""
    for line in summary_lines(step):
        console.print(Text(line))
    console.print()
    columns = columns_shown(step, rows, _MOST_COLUMNS)
    console.print(Text(" " * _MARGIN + _ruler(columns), style="dim"))
    for row in rows:
        console.print(_matrix_row(step, row, columns))
    console.print(Text(LEGEND, style="dim"))
    if left := len(step.relation.queries) - len(rows):
        console.print(Text(f"{left:,} queries and {step.cells.shape[1] - len(columns):,} documents are not shown"))
    for row in rows:
        console.print()
        console.print(Text("\n").join(_query(step, row)))
    console.print()


def _ruler(columns: Sequence[int]) -> str:
    """The number of every tenth of the documents that are shown."""
    line = ""
    for at in range(0, len(columns), 10):
        line = line.ljust(at) + f"D{columns[at] + 1}"
    return line


def _matrix_row(step: PairStep, row: int, columns: Sequence[int]) -> Text:
    line = Text(f"Q{row + 1}".ljust(_MARGIN))
    for column in columns:
        cell = CELLS[step.cells[row, column]]
        line.append(SIGNS[cell], style=_STYLES[cell])
    return line


def _query(step: PairStep, row: int) -> Iterator[Text]:
    found = step.row(row)
    yield Text(f"Q{row + 1} {_shown(found['query'])}", style="bold", overflow="ellipsis", no_wrap=True)
    yield Text(f"  {', '.join(map(visible, found['query']['places'][:3]))}", style="dim", overflow="fold")
    for cell, key in (("positive", "positives"), ("neither", "neither")):
        numbers = step.documents_of(row, cell)  # type: ignore[arg-type]
        for number, item in zip(numbers, found[key], strict=True):
            also = f"  (in {len(item['places'])} samples)" if len(item["places"]) > 1 else ""
            line = f"  {SIGNS[cell]} D{number + 1} {_shown(item)}{also}"
            yield Text(line, style=_STYLES[cell], overflow="ellipsis", no_wrap=True)


def _shown(item: dict[str, Any]) -> str:
    names = [f"[{visible(path_end(name, 40))}]" for name in item["images"]]
    return " ".join([*names, *([visible(shortened(item["text"], 60))] if item["text"] else [])])
