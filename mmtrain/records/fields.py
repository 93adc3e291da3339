"""Columns of a source mapped to the keys of a record, as its `fields` say."""

import string
from collections.abc import Mapping
from typing import Any

from mmtrain.records.chat import SampleError
from mmtrain.records.record_keys import Record
from mmtrain.safe_text import shown


def map_fields(record: Any, fields: Mapping[str, str]) -> Any:
    """`record` with the keys of `fields`, each filled from its column or from a template such as `{context}\\n{q}`.

    The columns used are removed, all others stay. Raises SampleError where a column is missing.
    """
    if not fields or not isinstance(record, dict):
        return record
    used: set[str] = set()
    made = {key: _value(record, source, used) for key, source in fields.items()}
    if both := sorted(key for key in made if key in record and key not in used):
        raise SampleError(f"`fields` gives {shown(both[0])}, which the record has too: rename or ignore one")
    return {key: value for key, value in record.items() if key not in used} | made


def _value(record: Record, source: str, used: set[str]) -> Any:
    pieces = list(string.Formatter().parse(source)) if "{" in source else [("", source, "", None)]
    columns = [name for _, name, _, _ in pieces if name is not None]
    if missing := [name for name in columns if name not in record]:
        raise SampleError(f"`fields` names the column {shown(missing[0])}, which is not in the record")
    used.update(columns)
    if "{" not in source:
        return record[source]
    return "".join(before + ("" if name is None else _words(record[name], name)) for before, name, _, _ in pieces)


def _words(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise SampleError(f"the column {shown(column)} of a template must be text or a whole number, not {shown(value)}")
