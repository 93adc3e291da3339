"""The parts of tests/torture, each with a few tries: runs survive them, and where one does not, it is reported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("runs that are killed, resumed and damaged, about a hundred of them")

TESTS = Path(__file__).parent
PARTS = ("kills", "agent", "resume", "worlds", "layouts", "corrupt", "histories", "changes", "quotas", "launches")


def torture(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "torture"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each part printed; all in one process, which imports torch once."""
    done = torture("--short", *PARTS)
    assert not done.stderr, done.stderr
    blocks = re.split(rf"^({'|'.join(PARTS)}): ", done.stdout, flags=re.MULTILINE)
    return dict(zip(blocks[1::2], blocks[2::2], strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_runs_stand_it(part: str, said: dict[str, str]) -> None:
    assert not said[part].startswith("BAD"), said[part]
    assert not re.match(r"0 ", said[part])  # it did try


SABOTAGE = """
import sys
sys.path.insert(0, sys.argv[1])
import torture.checkpoints, torture.layouts
import mmtrain.train.checkpoint as checkpoint
import mmtrain.train.checkpointer as checkpointer

restore, fault = checkpointer.restore, checkpoint._fault


def forget_the_moments(path, model, optimizer, share):
    restore(path, model, optimizer, share)
    optimizer.state.clear()


checkpointer.restore = forget_the_moments
print(torture.layouts.resume(2)[1])
checkpointer.restore, checkpoint._fault = restore, lambda path: None
print(torture.checkpoints.histories(30)[1])
"""


def test_the_script_reports_a_resume_without_moments_and_a_store_that_checks_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SABOTAGE, str(TESTS)], capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_an_unknown_part_is_refused() -> None:
    done = torture("no-such-part")
    assert done.returncode == 2
    assert "no such part: no-such-part" in done.stderr
