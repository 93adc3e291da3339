"""Columns of a source mapped to the keys of a record, as its `fields` and its `prompt` say."""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmtrain.config.data_section import LETTER, LETTERS, Source
from mmtrain.records.chat import SampleError
from mmtrain.records.record_keys import Record
from mmtrain.safe_text import shown

_IMAGE_FOLDER = {"file_name": "image", "file_names": "images"}
"""The columns of `metadata.csv` and the like that name images, as in the ImageFolder of `datasets`."""


def with_fields(record: Any, spec: Source, file: Path) -> Any:
    """`record`, read from `file`, with the keys that `spec` gives it. Raises SampleError where a column is missing."""
    record = map_fields(record, spec.fields)
    if not isinstance(record, dict):
        return record
    if file.name.partition(".")[0] == "metadata" and not ("image" in record or "images" in record):
        record = {_IMAGE_FOLDER.get(key, key): value for key, value in record.items()}
    if spec.prompt is None:
        return record
    if "prompt" in record:
        raise SampleError("both the record and the source have a `prompt`: keep one")
    return record | {"prompt": spec.prompt}


def map_fields(record: Any, fields: Mapping[str, str]) -> Any:
    """`record` with the keys of `fields`, each filled from its column, from something in it (`answers.0`,
    `body.messages`), or from a template such as `{context}\\n{q}`.

    The columns used are removed, all others stay, also those of which something was used. Raises SampleError where a
    column is missing.
    """
    if not fields or not isinstance(record, dict):
        return record
    used: set[str] = set()
    made = {key: _value(record, source, used) for key, source in fields.items()}
    left = {key for key in made if not fields[key].startswith(f"{key}.")}  # `body: body.text` takes its own place
    if both := sorted(left & record.keys() - used):
        raise SampleError(
            f"`fields` gives {shown(both[0])}, which the record has too: to leave that one out, add origin: {both[0]}"
        )
    return {key: value for key, value in record.items() if key not in used} | made


def _value(record: Record, source: str, used: set[str]) -> Any:
    if "{" not in source:
        return _column(record, source, used)
    return "".join(
        before + ("" if name is None else _text(_column(record, name, used), name, spec or ""))
        for before, name, spec, _ in string.Formatter().parse(source)
    )


def _column(record: Record, name: str, used: set[str]) -> Any:
    if name in record:
        used.add(name)
        return record[name]
    found: Any = record
    steps = name.split(".")
    while steps:
        num = 1  # of the steps that are one key, which may have dots itself
        if isinstance(found, list) and steps[0].isdecimal() and int(steps[0]) < len(found):
            found = found[int(steps[0])]
        else:
            keys = [".".join(steps[:end]) for end in range(len(steps), 0, -1)] if isinstance(found, dict) else []
            key = next((key for key in keys if key in found), None)
            if key is None:
                raise SampleError(f"`fields` names the column {shown(name)}, which is not in the record")
            found, num = found[key], key.count(".") + 1
        steps = steps[num:]
    return found


def _text(value: Any, column: str, spec: str) -> str:
    if value is None:
        return ""
    if spec == LETTERS:
        if not isinstance(value, list) or len(value) > len(ascii_uppercase):
            raise SampleError(f"the column {shown(column)} with `:{LETTERS}` must be a list, not {shown(value)}")
        return "\n".join(f"{ascii_uppercase[n]}. {_text(one, column, '')}" for n, one in enumerate(value))
    if spec == LETTER:
        if not str(value).isdecimal() or int(value) >= len(ascii_uppercase):
            raise SampleError(f"the column {shown(column)} with `:{LETTER}` must be 0 to 25, not {shown(value)}")
        return ascii_uppercase[int(value)]
    if isinstance(value, int) and not isinstance(value, bool):
        return format(value, spec)
    if isinstance(value, str):
        return value.rjust(int(spec), "0") if spec else value
    if isinstance(value, dict | list):
        try:
            return json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):  # of bytes or dates, as tables have them
            raise SampleError(f"the column {shown(column)} cannot be written as JSON: {shown(value)}") from None
    raise SampleError(f"the column {shown(column)} of a template must be text or a whole number, not {shown(value)}")
