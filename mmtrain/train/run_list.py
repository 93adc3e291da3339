"""`mmtrain runs`: the runs in a folder, from their files. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from mmtrain.command_output import plain_console
from mmtrain.errors import UserError
from mmtrain.safe_text import visible
from mmtrain.train.folder import is_locked
from mmtrain.train.summary import duration, summarize


def print_runs(folder: Path) -> None:
    """Print a row for each run in `folder`, or for `folder` itself. Raises UserError if there is none."""
    runs = [path for path in (folder, *_folders_in(folder)) if (path / "config.yaml").is_file()]
    if not runs:
        raise UserError(
            f"{visible(str(folder.absolute()))}: no run there: give a folder that has runs (run.output_dir)"
        )
    table = Table("run", "state", "steps", "loss", "perplexity", "training time", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for run in runs:
        table.add_row(visible(run.name), *_figures(run))
    plain_console().print(table)


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _figures(run: Path) -> Iterator[str]:
    found = summarize(run)
    yield "running" if is_locked(run) else "finished" if found.is_finished else "stopped"
    yield f"{found.num_steps:,}"
    yield "–" if found.loss is None else f"{found.loss:.4f}"
    yield "\n".join(f"{visible(one.name)} {one.last:,.4f}" for one in found.evals) or "–"
    yield duration(found.seconds)
