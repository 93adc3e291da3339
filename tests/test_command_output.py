"""What every command prints with --json is JSON, whatever is in it."""

import io
import json
import math
import sys
from typing import Any

import pytest

from mmtrain.command_output import print_json


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
