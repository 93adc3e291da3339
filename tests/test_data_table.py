"""Training, inspect-labels and evaluation read the same conversation of every shape and file; docs/data.md says so."""

from pathlib import Path

import pytest

from support.data_table import COMMANDS, HEAD, results, rows, table


@pytest.mark.slow("several commands")
def test_every_command_reads_the_conversation_that_is_written_by_hand(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert len(found) > 50
    wrong = {
        name: [command for command, reads in zip(COMMANDS, of_commands, strict=True) if not reads]
        for name, (_, of_commands) in found.items()
        if not all(of_commands)
    }
    assert wrong == {}
    assert table() == HEAD + "".join(rows(found)), "write it: PYTHONPATH=.:tests python -m support.data_table --write"
