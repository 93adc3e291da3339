"""Runs commands of mmtrain one after the other in this process, and reports how each ended.

Reads a JSON list of {"name", "words"} from standard input and writes a JSON object to standard output: for each name
the exit code and what was printed, and the peak memory of the process in bytes.
"""

import contextlib
import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

SECONDS = 120
"""A command that takes longer hangs. It takes a few seconds; the rest is for a machine that does other work too."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def _stop(*_: Any) -> None:
    raise Hang


def run(words: list[str]) -> dict[str, Any]:
    """The exit code, None for a hang, and the output of `mmtrain words`."""
    from mmtrain.cli import main

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["mmtrain", *words]
    code: Any = 0
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except Hang:
            code = None
        except BaseException as error:  # what python would print as a traceback
            code, _ = 1, err.write(f"Traceback: {type(error).__name__}: {error}")
    signal.alarm(0)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _stop)
    found = {case["name"]: run(case["words"]) for case in json.load(sys.stdin)}
    # getrusage's maximum includes what the process that started this one had
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    json.dump({"cases": found, "peak_bytes": int(peak) * 1024}, sys.stdout)
