"""`mmtrain inspect-data`: what the data of a config is made of, as text, JSON or a page."""

import json
from pathlib import Path

from rich.console import Console

from mmtrain.config import Config
from mmtrain.dataset.shard_order import first_file
from mmtrain.encoding.load import processor_of
from mmtrain.errors import UserError, storage_faults
from mmtrain.inspect_data.overlap import find_overlap
from mmtrain.inspect_data.report import DataReport, overlap_lines
from mmtrain.inspect_labels.audit import audit
from mmtrain.progress import Progress
from mmtrain.safe_text import shown, visible


def inspect_data(config: Config, as_json: bool, html: Path | None) -> int:
    """Print what the data is made of, or write it as a page. Returns the exit code: 1 if a sample has a fault.

    Raises UserError where a source cannot be read, and StorageError.
    """
    if config.objective.kind != "chat":
        raise UserError(
            "inspect-data is for chats; `mmtrain inspect-labels CONFIG --all` checks the pairs of a contrastive config"
        )
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise UserError(f"--html {shown(html)}: expected the name of a file in a folder that exists")
    report = _report(first_file(config, Progress().say))
    if html is not None:
        with storage_faults(f"--html {shown(html)}: it cannot be written"):
            html.write_text(report.page(), encoding="utf-8", newline="\n")
        print(f"wrote {visible(str(html))}")
    elif as_json:
        print(json.dumps(report.row()))
    else:
        _print(report)
    return 1 if report.num_faults else 0


def _report(config: Config) -> DataReport:
    if not config.data.eval:
        return DataReport((audit(config, "train"),), None)
    reports, progress = (audit(config, "train"), audit(config, "eval")), Progress()
    with progress.task("comparing train and eval"):
        overlap = find_overlap(config, processor_of(config.model), progress)
    return DataReport(reports, overlap)


def _print(report: DataReport) -> None:
    console = Console(highlight=False, emoji=False, markup=False)
    for split in report.splits:
        split.print(console)
        console.print()
    for line in overlap_lines(report.overlap):
        console.print(line, soft_wrap=True)
