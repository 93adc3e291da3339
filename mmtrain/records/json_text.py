"""JSON as data has it: nothing that another reader would read otherwise passes."""

import json
from typing import Any

from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown
from mmtrain.text_files import NOT_UTF8

MAX_RECORD = 32 * 2**20
"""The most bytes of one record. Parsing needs at most 30 times as much memory."""


def too_long(num_bytes: int) -> SampleError:
    """The refusal of a record of so many bytes."""
    return SampleError(
        f"a record of {num_bytes:,} bytes, over the {MAX_RECORD:,} allowed: split it, or give its images by path"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON: write null")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json(line: bytes) -> Any:
    """One JSON value. Raises SampleError also for what Python accepts: equal keys, NaN and very deep nesting."""
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise SampleError(NOT_UTF8) from None
    except json.JSONDecodeError as error:
        is_utf16 = b"\0" in line[:4] and line.strip(b"\0\r\n")
        raise SampleError(NOT_UTF8 if is_utf16 else f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        is_long = "int_max_str_digits" in str(error)
        raise SampleError(f"not JSON: {'a number of thousands of digits' if is_long else error}") from None
    except RecursionError:
        raise SampleError("not JSON that can be read: nested too deeply") from None


def parsed_value(value: Any, name: str) -> Any:
    """`value`, or what it is the JSON text of, as tables have it. `name` says what it is. Raises SampleError."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode("utf-8", "surrogatepass"))
    except SampleError as error:
        is_python = value.lstrip().startswith(("['", "[{'", "{'"))
        remedy = ": it is the text of a Python value, write it with json.dumps" if is_python else ""
        raise SampleError(f"{shown(name, 60)}: {error}{remedy}") from None
