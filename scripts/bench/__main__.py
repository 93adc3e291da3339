"""Measures mmtrain. Needs the project's environment: `.venv/bin/python scripts/bench`.

    python scripts/bench [OPTION...]                 speed and memory next to two other programs
    python scripts/bench growth [OPTION...]          the cost of a token as the data and the samples grow
    python scripts/bench contrastive [OPTION...]     contrastive steps next to two other libraries
    python scripts/bench balance CONFIG [OPTION...]  how long processes would wait for each other
    python scripts/bench loader [OPTION...]          images per second and core
    python scripts/bench step [OPTION...]            operations and memory of a step of the 7B shape on a GPU

`--help` after any of them lists its options.
"""

import os
import sys
from pathlib import Path

SCRIPTS = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, SCRIPTS)
# The measured programs run in processes of their own, which import from here too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SCRIPTS, os.environ.get("PYTHONPATH"))))

from bench import balance, compare, contrastive, growth, loader, step  # noqa: E402

COMMANDS = {
    "growth": growth.main,
    "contrastive": contrastive.main,
    "balance": balance.main,
    "loader": loader.main,
    "step": step.main,
}


def main() -> None:
    words = sys.argv[1:]
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        compare.main(words)
    else:
        command(words[1:])


if __name__ == "__main__":
    main()
