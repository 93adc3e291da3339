"""YAML with line numbers: only the JSON-like core of YAML 1.2.

PyYAML reads YAML 1.1: `1e-4` is a string, `no` is false, `010` is 8, the last of two equal keys wins, and a few aliases
can expand to millions of values. Here numbers are numbers, and the rest is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mmtrain.errors import UserError
from mmtrain.safe_text import shown, visible
from mmtrain.text_files import read_text

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

_PLAIN = re.compile(r"[A-Za-z][\w./-]*|[./][\w./-]+")
"""Text that YAML reads as text without quotes."""
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "true": True,
    "True": True,
    "false": False,
    "False": False,
}


class _Loader(yaml.SafeLoader):
    """Builds the tree of nodes. Refuses aliases, tags and deep nesting before they take memory or time."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("an alias (*) is not allowed: write the value out", _line(event))
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Refused(f"the tag {shown(tag)} is not allowed", _line(event))
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}", _line(event))
        self.depth += 1
        if any("\ud800" <= character <= "\udfff" for character in getattr(event, "value", "")):
            raise _Refused("text with half of a surrogate pair", _line(event))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


class _Refused(Exception):
    def __init__(self, reason: str, line: int) -> None:
        self.reason, self.line = reason, line


def parse_yaml(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """`text` as plain data, and the first line (from 1) of each key path.

    Raises UserError with `name` and the line for anything that is not plain YAML.
    """
    try:
        node = _Loader(text).get_single_node()
    except _Refused as error:
        raise UserError(f"{name}:{error.line}: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}:1: not YAML: {shown(error)}") from None
    lines: dict[KeyPath, int] = {}
    faults: list[str] = []
    value = None if node is None else _plain(node, (), lines, faults, name)
    if faults:
        raise UserError(faults)
    return value, lines


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """`parse_yaml` of a file. Raises UserError also if it cannot be read."""
    name = visible(str(path))
    return parse_yaml(read_text(path, name, MAX_BYTES), name)


def _plain(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], faults: list[str], name: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if isinstance(node, yaml.ScalarNode):
        return unquoted(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*at, i), lines, faults, name) for i, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key in mapping:
            what = "a key must be a word" if key is None else f"the key {shown(key)} is given twice"
            faults.append(f"{name}:{key_line}: {what}")
            continue
        lines[(*at, key)] = key_line
        mapping[key] = _plain(value_node, (*at, key), lines, faults, name)
    return mapping


def unquoted(text: str) -> Any:
    """The value of a scalar that is neither quoted nor a block; those are always text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) <= 40 and _INT.fullmatch(text):
        return int(text)
    if len(text) <= 40 and _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Dumper(yaml.SafeDumper):
    """Also quotes text that is a number only in YAML 1.2, such as `1e-4`."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_text = isinstance(unquoted(text), str)
    style = '"' if not text.isprintable() else None if is_text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_text(text: str) -> str:
    """Text as a value on one line of YAML."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=not text.isprintable())
