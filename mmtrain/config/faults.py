"""The faults that pydantic finds in a config, in mmtrain's words: one for each key path."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mmtrain.config.other_tools import INSTEAD
from mmtrain.config.schema import Config
from mmtrain.config.tune_section import Frozen, Full, Lora
from mmtrain.config.yaml_file import KeyPath, unquoted
from mmtrain.safe_text import shown

_MODES: dict[str, type[BaseModel]] = {"frozen": Frozen, "lora": Lora, "full": Full}
_SECTIONS = ("model_type", "model_attributes_type", "dict_type")
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean (true or false)",
    "string_type": "a string",
    "string_too_short": "at least {min_length} character",
    "string_pattern_mismatch": "a path without a null character",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le:,}",
}
"""The expected value, for kinds of errors that need no other explanation."""


def schema_faults(errors: Sequence[ErrorDetails], data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The key path and the reason of each fault. If a value can have several types, their errors are one fault."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        if not _follows_from_another(error):
            found.setdefault(_written(error, data), []).append(error)
    for at, of_key in found.items():
        expected = [_expected(error) for error in of_key]
        if all(expected):
            words = " or ".join(dict.fromkeys(word for word in expected if word))
            yield at, f"expected {words}, {_found(of_key[0]['input'])}"
        else:
            yield at, _reason(of_key[0], at, data)


def _follows_from_another(error: ErrorDetails) -> bool:
    """Whether another error already reports this fault: for pydantic, a list whose only item is wrong is too short."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _written(error: ErrorDetails, data: dict[str, Any]) -> KeyPath:
    """The key path as a user writes it: pydantic adds the names of a union's members."""
    at: KeyPath = error["loc"]
    if len(at) > 2 and at[0] == "tune":
        at = (*at[:2], *at[3:])
    here: Any = data
    for n, step in enumerate(at):
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int))
        if not inside:
            return at if error["type"] == "missing" else at[:n]
        here = here[step]
    return at


def _expected(error: ErrorDetails) -> str | None:
    words = _EXPECTED.get(error["type"])
    limits = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in error.get("ctx", {}).items()}
    return None if words is None else words.format(**limits)


def _reason(error: ErrorDetails, at: KeyPath, data: dict[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(at, data)
    if kind == "missing":
        return "required, but missing"
    if kind.startswith("union_tag"):
        mode = value.get("mode") if isinstance(value, dict) else value
        return "needs `mode: frozen`, `mode: lora` or `mode: full`" + (f", not {shown(mode)}" if mode else "")
    if kind in _SECTIONS:
        return f"expected a section of keys, such as {{{_valid_keys((*at, ''), data)[0]}: ...}}, {_found(value)}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg']}, {_found(value)}"


def _found(value: Any) -> str:
    """The value that is not as expected. A number in quotes is text, which looks like the number."""
    if value is None:
        return "but it is empty"
    is_quoted_number = isinstance(value, str) and isinstance(unquoted(value), int | float)
    return f"not {shown(value)}" + (" in quotes: remove them" if is_quoted_number else "")


def _unknown_key(at: KeyPath, data: dict[str, Any]) -> str:
    key = str(at[-1])
    if len(at) == 3 and at[0] == "tune" and at[1] != "components":
        component = f"{at[0]}.{at[1]}"
        mode = data["tune"][at[1]]["mode"]
        others = [name for name, model in _MODES.items() if key in model.model_fields]
        if others:
            return (
                f"only for mode: {' and '.join(others)}, and {component}.mode is {mode}: remove it, or set the whole "
                f"section, such as {component}='{{mode: {mode}}}'"
            )
    valid = _valid_keys(at, data)
    if key in INSTEAD:
        return f"unknown key; {INSTEAD[key]}"
    if elsewhere := _paths_of(key):
        return f"unknown key; {elsewhere}"
    near = difflib.get_close_matches(key[:80], valid, n=1, cutoff=0.6)
    return "unknown key" + (f"; did you mean {shown(near[0])}?" if near else f"; expected one of {', '.join(valid)}")


def key_of_option(option: str) -> str:
    """How to set the key that an option of another tool, such as `--learning_rate`, stands for; empty if none."""
    key = option.lstrip("-").replace("-", "_").rpartition(".")[2]
    return INSTEAD.get(key) or _paths_of(key)


def _paths_of(key: str) -> str:
    """The shortest key paths that end in `key`, as a question; empty if there is none."""
    paths = [path for path in _key_paths(Config) if path.rpartition(".")[2] == key]
    depth = min((path.count(".") for path in paths), default=0)
    return f"did you mean {' or '.join(path for path in paths if path.count('.') == depth)}?" if paths else ""


def _valid_keys(at: KeyPath, data: dict[str, Any]) -> list[str]:
    """The valid keys of the section that contains the key path `at`."""
    model: type[BaseModel] = Config
    here: Any = data
    for step in at[:-1]:
        here = here[step]
        if isinstance(step, int):
            continue
        if step in ("vision", "projector", "language"):
            model = _MODES.get(str(here["mode"]), Frozen) if isinstance(here, dict) and "mode" in here else Frozen
        else:
            model = next(_models_in(model.model_fields[step].annotation))
    return [field.alias or name for name, field in model.model_fields.items()]


def _key_paths(model: type[BaseModel], inside: str = "") -> list[str]:
    """Every key path of a config, in the order of the schema; one for all items of a list."""
    paths: dict[str, None] = {}
    for name, field in model.model_fields.items():
        path = inside + (field.alias or name)
        paths[path] = None
        for inner in _models_in(field.annotation):
            paths |= dict.fromkeys(_key_paths(inner, f"{path}."))
    return list(paths)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
