"""`mmtrain inspect-data`: what the data of a config is made of, as text, JSON or a page."""

from pathlib import Path

from mmtrain.command_output import check_page, plain_console, print_json, write_page
from mmtrain.config import Config
from mmtrain.dataset.shard_order import first_file
from mmtrain.encoding.load import processor_of
from mmtrain.errors import UserError
from mmtrain.inspect_data.overlap import find_overlap
from mmtrain.inspect_data.report import DataReport, overlap_lines
from mmtrain.inspect_labels.audit import audit
from mmtrain.progress import Progress
from mmtrain.safe_text import visible


def inspect_data(config: Config, as_json: bool, html: Path | None) -> int:
    """Print what the data is made of, or write it as a page. Returns the exit code: 1 if a sample has a fault.

    Raises UserError where a source cannot be read, and StorageError.
    """
    if config.objective.kind != "chat":
        raise UserError(
            "inspect-data is for chats; `mmtrain inspect-labels CONFIG --all` checks the pairs of a contrastive config"
        )
    check_page(html)
    report = _report(first_file(config, Progress().say))
    if html is not None:
        write_page(html, report.page())
        print(f"wrote {visible(str(html))}")
    elif as_json:
        print_json(report.row())
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
    console = plain_console()
    for split in report.splits:
        split.print(console)
        console.print()
    for line in overlap_lines(report.overlap):
        console.print(line, soft_wrap=True)
