"""`python -m fake_cuda LIBRARY`: reads cases from standard input, one JSON object a line, and answers each with a line.

Every case has a process of its own, forked from this one: importing takes longer than a case.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from fake_cuda.native import load_device


def _answer(case: str) -> str:
    from fake_cuda.cases import run

    try:
        return json.dumps(run(json.loads(case)))
    except BaseException:
        return json.dumps({"error": traceback.format_exc()})


def _in_a_process(case: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w") as file:
            file.write(_answer(case))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = file.read()
    os.waitpid(child, 0)
    return found or json.dumps({"error": "the process of the case died"})


def _leave_out_own_positions() -> None:
    """The trial of packing compares with positions that the model computes itself, for which it reads numbers below
    Python's dispatch. The fake GPU cannot do that; the tests on the CPU cover it."""
    from mmtrain.model import packing_trial

    packing_trial._Trial.plain_logits = lambda trial, number: trial.logits([number], False)  # type: ignore[method-assign, assignment]


def main() -> None:
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads would not know of the fake device
    load_device(Path(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    import torch

    from fake_cuda import cases, device
    from support.forked import PRELOADED

    for name in PRELOADED:
        importlib.import_module(name)
    assert cases
    torch.set_num_threads(1)
    device.install()
    _leave_out_own_positions()
    for case in sys.stdin:
        answers.write(_in_a_process(case) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
