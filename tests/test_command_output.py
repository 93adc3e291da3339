"""What every command prints with --json is JSON, whatever is in it."""

import io
import json
import math
import sys
from typing import Any

import pytest
from rich.table import Table

from mmtrain.command_output import plain_console, print_json


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"a": math.nan, "b": [math.inf, -math.inf, 1.5]}, {"a": None, "b": [None, None, 1.5]}),
        ({"NaN": "Infinity"}, {"NaN": "Infinity"}),
        ({"name": "caf\udce9 \U0001f98a"}, {"name": "caf\udce9 \U0001f98a"}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_row_is_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], expected: dict[str, Any], encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    print_json(row)
    sys.stdout.flush()
    (line,) = written.getvalue().decode(encoding).splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == expected


@pytest.mark.parametrize("columns", ["20", "200"])
def test_a_table_keeps_its_columns_in_a_narrow_terminal_and_no_spaces_at_its_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("source", "samples", "trained on", "faults", box=None, pad_edge=False, title="Audit")
    table.add_row("train.jsonl", "1,200", "10,000", "3")
    table.add_row("a", "1", "", "")
    plain_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["source", "samples", "trained", "on", "faults"],
        ["train.jsonl", "1,200", "10,000", "3"],
        ["a", "1"],
    ]
    assert lines == [line.rstrip() for line in lines]
