"""`mmtrain report`: one HTML page about one or several runs, or their figures as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.atomic_files import check_writable
from mmtrain.command_output import print_json
from mmtrain.errors import UserError, storage_faults
from mmtrain.report.compare import differing_keys
from mmtrain.report.page import REPORT, write_report
from mmtrain.report.read import RunRecord, check_run, read_run
from mmtrain.safe_text import visible


def report(runs: Sequence[Path], output: Path | None, as_json: bool) -> None:
    """Write the page of `runs` to `output` (without it into the run, or the current directory), or print figures.

    Raises UserError where one is no run, and StorageError.
    """
    if as_json:
        print_json(figures([read_run(run) for run in runs]))
        return
    path = output or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    name = visible(str(path))
    for run in runs:
        check_run(run)
    check_writable(path)
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise UserError(f"--output: {name} is not a file: give the name of one")
    with storage_faults(f"{name}: the report cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(runs, path)
    print(f"wrote {name}")


def figures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"runs": [_figures(run) for run in runs], "differing": dict(differing_keys([run.config for run in runs]))}


def _figures(run: RunRecord) -> dict[str, Any]:
    found = run.summary
    return {
        "run": str(run.path),
        "is_finished": found.is_finished,
        "num_steps": found.num_steps,
        "num_tokens": found.num_tokens,
        "num_supervised": found.num_supervised,
        "seconds": found.seconds,
        "loss": found.loss,
        "perplexity": {
            one.name: {"first": one.first, "last": one.last, "best": one.best, "best_step": one.best_step}
            for one in found.evals
        },
        "answers": {name: rows[-1] for name, rows in run.answers.items()},
        "data": {"train": run.facts.get("train"), "eval": run.facts.get("eval")},
        "num_left_out": run.dropped.number,
    }
