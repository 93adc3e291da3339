"""Tries to break runs, and prints a figure for each way it tried. Exit code 1 if a figure is bad.

    python tests/torture [PART...] [--short]

Without PART it runs all of them, which takes about half an hour on two cores. It needs the project's environment:
`.venv/bin/python tests/torture`.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS.parent), str(TESTS)]  # in place of this folder, which python puts there

from mmtrain.runtime.environment import set_environment  # noqa: E402

set_environment()  # as the command does, before a part imports torch

PARTS = {
    "layouts": "layouts",
    "kills": "kills",
    "agent": "kills",
    "resume": "layouts",
    "worlds": "layouts",
    "corrupt": "checkpoints",
    "histories": "checkpoints",
    "changes": "changes",
    "quotas": "quotas",
    "launches": "kills",
    "signals": "signals",
    "faults": "signals",
    "nodes": "signals",
}
"""Each part is a function of its name in a module, which gives the line to print and whether it is good."""
SHORT: dict[str, dict[str, Any]] = {
    "layouts": {"worlds": (1, 2), "packings": (True,), "steps": 3, "launcher": False},
    "kills": {"signals": 4, "worlds": (1, 2)},
    "agent": {"times": 1, "steps": (3,), "launcher": False},
    "resume": {"steps": 2},
    "worlds": {"worlds": (1, 2), "others": False},
    "corrupt": {"flips": 100, "truncations": 20},
    "histories": {"histories": 30},
    "changes": {"names": ("image byte", "LoRA rank")},
    "quotas": {"sizes": 3},
    "launches": {"pairs": 2},
    "signals": {"signums": (signal.SIGTERM,), "phases": ("forward",)},
    "faults": {"stops": 1, "nans": 1, "loaders": 1, "launched": False, "full": False},
}
"""The arguments with which a part takes seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--short", action="store_true", help="a few tries of each")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    bad = False
    for name in args.parts or PARTS:
        part: Callable[..., tuple[str, bool]] = getattr(importlib.import_module(f"torture.{PARTS[name]}"), name)
        line, good = part(**(SHORT.get(name, {}) if args.short else {}))
        bad |= not good
        print(f"{name}: {'' if good else 'BAD: '}{line}", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
