"""The report that every finished run has."""

import sys
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.report.page import REPORT, write_report
from mmtrain.safe_text import visible


def report_after_run(run: Path) -> None:
    """Write report.html into the directory of a finished run, and say so.

    A fault is only reported: the run is complete without a report.
    """
    path = run / REPORT
    try:
        write_report([run], path)
    except (UserError, OSError) as error:
        print(f"{visible(str(path))}: not written: {error}", file=sys.stderr)
    else:
        print(f"report: {visible(str(path))}", file=sys.stderr)
