"""The figures of `eval retrieval` for a person, in 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.retrieval.figures import DIRECTIONS
from mmtrain.retrieval.metrics import NAMES
from mmtrain.safe_text import counted, path_end, shortened, visible
from mmtrain.scoring.results import figure_table, say

_NUM_SHOWN = 5


def print_report(row: Mapping[str, Any], console: Console) -> None:
    """Prints what `row`, made by `figures`, has."""
    for name, source in row["sources"].items():
        say(visible(name), console)
        _print_directions(source, console)
    if row["sources"]:
        say("All sources together", console)
    _print_directions(row, console)
    for key, found in directions_of(row).items():
        if found["most_confused"]:
            say(f"{DIRECTIONS[key]}, most confused:", console)
        for one in found["most_confused"][:_NUM_SHOWN]:
            say(f"  {_confused(one)}", console)
    if row["zero_shot"] is not None:
        console.print()
        console.print(_zero_shot_table(row["zero_shot"]))
    if row["dropped"]:
        say(f"\n{counted(len(row['dropped']), 'sample')} left out", console)


def directions_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of both directions by name, in the order of the report."""
    return {key: row[key] for key in DIRECTIONS if key in row}


def counts(found: Mapping[str, Any]) -> str:
    return f"{found['num_queries']:,} searches among {found['num_candidates']:,} candidates"


def rows_of(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """A metric, its mean, its interval, the mean of a random order, and where there is a base model, its mean and the
    difference."""
    for metric in NAMES:
        low, high = found["interval"][metric]
        cells = [metric, f"{found[metric]:.1%}", f"{low:.1%} to {high:.1%}", f"{found['chance'][metric]:.1%}"]
        if "base" in found:
            low, high = found["minus_base"]["interval"][metric]
            points = f"{100 * found['minus_base'][metric]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            cells += [f"{found['base'][metric]:.1%}", points]
        yield cells


def _print_directions(row: Mapping[str, Any], console: Console) -> None:
    for key, found in directions_of(row).items():
        say(f"{DIRECTIONS[key]}: {counts(found)}", console)
        table = figure_table("", "mean", "95 %", "chance", *(("base", "points more (95 %)") if "base" in found else ()))
        for cells in rows_of(found):
            table.add_row(*cells)
        console.print(table)
        console.print()


def _zero_shot_table(found: Mapping[str, Any]) -> Table:
    table = figure_table(
        f"Zero-shot, {found['num_classes']:,} classes, {counted(found['num_images'], 'image')}", "mean", "95 %"
    )
    for name, (low, high) in found["interval"].items():
        table.add_row(name, f"{found[name]:.1%}", f"{low:.1%} to {high:.1%}")
    table.add_row("mean over classes of accuracy@1", f"{found['mean_class_accuracy']:.1%}", "")
    worst = sorted(found["by_class"].items(), key=lambda one: one[1])[:_NUM_SHOWN]
    for name, accuracy in worst:
        table.add_row(Text(f"  {_short(name, 40)}"), f"{accuracy:.1%}", "")
    return table


def _confused(one: Mapping[str, Any]) -> str:
    scores = f"{one['wrong_score']:.3f} against {one['right_score']:.3f}, rank {one['rank']:,}"
    return f"{visible(one['query']['place'])}  {_shown(one['query'])}  →  {_shown(one['wrong'])}  ({scores})"


def _shown(item: Mapping[str, Any]) -> str:
    names = [f"[{visible(path_end(name, 40))}]" for name in item["images"]]
    return " ".join([*names, *([_short(item["text"], 50)] if item["text"] else [])])


def _short(text: str, limit: int) -> str:
    return visible(shortened(text, limit))
