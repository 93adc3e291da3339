"""The reference of all config keys as a Markdown page, `docs/config.md`, rendered from the schema."""

import json
from collections.abc import Iterator
from typing import Any

from mmtrain.config.other_tools import table
from mmtrain.config.schema import json_schema

Node = dict[str, Any]
"""A node of a JSON Schema."""

_INTRO = """\
# Config reference

Printed by `mmtrain config docs`. Do not edit this page: edit the docstrings in `mmtrain/config/`.

A config is one YAML file. A key marked *required* has no default. Every key can also be set on the command line by its
full name, such as `tune.language.rank=8`. Unknown keys are refused with their line and the nearest valid key.
"""
_OTHER_TOOLS = """\
## Keys of other tools

The names in LLaMA-Factory, ms-swift, axolotl, TRL, open_clip, sentence-transformers and VLM2Vec. Each is refused with
the words next to it.
[Coming from another tool](other-tools.md) shows a whole config.
"""
_TYPE_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "names, each with a value",
}


def reference() -> str:
    """The page: one table for each section of the config, with the type, default and meaning of every key."""
    schema = json_schema()
    tables = [_table(name, places, schema) for name, places in _places(schema).items()]
    return "\n".join([_INTRO, *tables, _OTHER_TOOLS, table()])


def _places(schema: Node) -> dict[str, list[str]]:
    """For each section of the schema, by name, the places in a config that can have it; in the order of the keys."""
    found: dict[str, list[str]] = {}

    def visit(section: Node, prefix: str) -> None:
        for key, node in section["properties"].items():
            for name, place in _sections(node, prefix + key):
                found.setdefault(name, []).append(place)
                visit(schema["$defs"][name], f"{prefix}{key}.")

    visit(schema, "")
    return found


def _sections(node: Node, key: str) -> Iterator[tuple[str, str]]:
    """The sections that the value of `key` can be, each with its place."""
    if "$ref" in node:
        yield _name(node), f"`{key}`"
    elif "items" in node:
        for item in node["items"].get("anyOf", [node["items"]]):
            if "$ref" in item:
                yield _name(item), f"each entry of `{key}`"
    elif "anyOf" in node:
        for option in node["anyOf"]:
            yield from _sections(option, key)
    elif "oneOf" in node:
        for mode, reference in node["discriminator"]["mapping"].items():
            yield _name({"$ref": reference}), f"`{key}` with `{node['discriminator']['propertyName']}: {mode}`"


def _name(node: Node) -> str:
    return str(node["$ref"]).rpartition("/")[2]


def _table(name: str, places: list[str], schema: Node) -> str:
    section = schema["$defs"][name]
    path = places[0].strip("`")
    prefix = f"{path}." if len(places) == 1 and " " not in path else ""  # otherwise the full key is not known
    rows = [
        f"| `{prefix}{key}` | {_type(node)} | {_default(key, node, section)} | {_meaning(node)} |"
        for key, node in section["properties"].items()
    ]
    description = schema["properties"].get(path, {}).get("description")
    head = f"## `{path}`\n\n{_line(description)}" if description else f"### {_title(places)}"
    return "\n".join([head, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _title(places: list[str]) -> str:
    """`a` with `x`, `b` with `x` → `a`, `b` with `x`."""
    keys = [place.partition(" with ")[0] for place in places]
    title = ", ".join(keys) + "".join(places[0].partition(" with ")[1:])
    return title[0].upper() + title[1:]


def _type(node: Node) -> str:
    if "anyOf" in node:
        return " or ".join(_type(option) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum") or [node["const"]])
    if "oneOf" in node:
        return "section, by its `mode`: " + ", ".join(f"`{mode}`" for mode in node["discriminator"]["mapping"])
    if "$ref" in node:
        return "section"
    if node["type"] == "array":
        return f"list of {_type(node['items'])}"
    if node.get("additionalProperties") == {"type": "string"}:
        return "names, each with a text"
    return _TYPE_WORDS[node["type"]] + _range(node)


def _range(node: Node) -> str:
    is_integer = node["type"] == "integer"
    bounds = [
        ("≥", node["exclusiveMinimum"] + 1 if is_integer and "exclusiveMinimum" in node else node.get("minimum")),
        (">", None if is_integer else node.get("exclusiveMinimum")),
        ("≤", node.get("maximum")),
        ("<", node.get("exclusiveMaximum")),
    ]
    words = ", ".join(f"{sign} {bound:,}" for sign, bound in bounds if bound is not None)
    return f" ({words})" if words else ""


def _default(key: str, node: Node, section: Node) -> str:
    if key in section.get("required", ()):
        return "*required*"
    if "$ref" in node:
        return "its keys' defaults"
    default = node["default"]
    if isinstance(default, dict) and "mode" in default:  # a section
        return f"`{{mode: {default['mode']}}}`"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _meaning(node: Node) -> str:
    return _line(node.get("description", "")).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())
