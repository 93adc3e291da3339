"""From a YAML file and `key=value` overrides to a `Config`, or to all faults at once, each with its line."""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mmtrain.config.schema import Config, Frozen, Full, Lora
from mmtrain.config.yaml_file import KeyPath, dump_yaml, parse_yaml, read_yaml
from mmtrain.errors import UserError
from mmtrain.foreign_text import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MODES: dict[str, type[BaseModel]] = {"frozen": Frozen, "lora": Lora, "full": Full}
_COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a config. Raises UserError with every fault found, one line each."""
    data, lines = read_yaml(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}:1: expected sections (model, tune, data, labels, train), not {shown(data)}")
    where = {at: f"{path}:{line}" for at, line in lines.items()}
    faults = []
    for override in overrides:
        try:
            _apply(override, data, where)
        except UserError as error:
            faults += error.faults
    name = f"{path}:1"
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults += [_fault(item, data, where, name) for item in error.errors()]
    faults += _missing_files(data, where, name)
    if faults:
        raise UserError(faults)
    return config


def dump_config(config: Config) -> str:
    """The merged config as YAML, every key written out; loading it gives an equal `Config`."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(override: str, data: dict[str, Any], where: dict[KeyPath, str]) -> None:
    """Set one `section.key=value` in `data`; a number in the path is a place in a list that is there."""
    key, equals, text = override.partition("=")
    name = f"{_COMMAND_LINE}: {shown(override)}"
    if not equals or not key:
        raise UserError(f"{name}: expected section.key=value")
    value, _ = parse_yaml(text, name)
    *sections, last = key.split(".")
    at: list[str | int] = []
    target: Any = data
    for word in sections:
        at.append(step := _step(word, target, name))
        if isinstance(target, dict) and not isinstance(target.get(step), dict | list):
            target[step] = {}
            where[tuple(at)] = _COMMAND_LINE
        target = target[step]
    at.append(step := _step(last, target, name))
    target[step] = value
    for inner in [inner for inner in where if inner[: len(at)] == tuple(at)]:
        del where[inner]  # lines of what the override replaced
    where[tuple(at)] = _COMMAND_LINE


def _step(word: str, target: Any, name: str) -> str | int:
    """One word of a key path as the key of a section or the place in a list."""
    if isinstance(target, dict):
        return word
    if word.isdecimal() and len(word) < 6 and int(word) < len(target):
        return int(word)
    raise UserError(f"{name}: there is no {shown(word)} in a list of {len(target)}")


def _fault(item: Any, data: dict[str, Any], where: dict[KeyPath, str], name: str) -> str:
    at: KeyPath = item["loc"]
    if len(at) > 2 and at[0] == "tune":
        at = (*at[:2], *at[3:])  # pydantic puts the name of the union's member among the keys
    return f"{_place(at, where, name)}: {_key(at)}: {_reason(item, at, data)}"


def _key(at: KeyPath) -> str:
    """A key path on one printable line."""
    words = (str(step) if re.fullmatch(r"[\w-]{1,40}", str(step)) else shown(step, 40) for step in at)
    return ".".join(words) or "config"


def _place(at: KeyPath, where: dict[KeyPath, str], name: str) -> str:
    """Where the key path `at`, or the nearest section around it, was written."""
    return next((where[at[:n]] for n in range(len(at), 0, -1) if at[:n] in where), name)


def _reason(item: Any, at: KeyPath, data: dict[str, Any]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(str(at[-1]), _valid_keys(at, data))}"
    if kind == "missing":
        return "required, and not given"
    if kind.startswith("union_tag"):
        mode = value.get("mode") if isinstance(value, dict) else value
        return "needs `mode: frozen`, `mode: lora` or `mode: full`" + (f", not {shown(mode)}" if mode else "")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a section of keys, not {shown(value)}"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{message.replace('input should be', 'expected')}, not {shown(value)}"


def _valid_keys(at: KeyPath, data: dict[str, Any]) -> list[str]:
    """The keys that the section around the key path `at` may have."""
    model: type[BaseModel] = Config
    here: Any = data
    for step in at[:-1]:
        here = here[step]
        if isinstance(step, int):
            continue
        if step in ("vision", "projector", "language"):
            model = _MODES.get(here.get("mode"), Frozen)
        else:
            model = next(_models_in(model.model_fields[step].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key[:80], valid, n=1, cutoff=0.5)
    return f"; did you mean {shown(near[0])}?" if near else f"; expected one of {', '.join(valid)}"


def _missing_files(data: dict[str, Any], where: dict[KeyPath, str], name: str) -> Iterator[str]:
    """A fault for each path in the raw config that leads nowhere; what is not a path at all is left to the schema."""
    for at, path in _paths(data):
        is_model = at == ("model", "path")
        if is_model:
            exists = os.path.isdir(path) or _HUB_ID.fullmatch(path) is not None
        else:
            exists = os.path.exists(path) or (at[-1] == "path" and "\0" not in path and bool(glob.glob(path)))
        if not exists:
            expected = "expected a model directory or a hub id; " if is_model else ""
            yield f"{_place(at, where, name)}: {_key(at)}: {expected}there is no {shown(path)}"


def _paths(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    model, sections = data.get("model"), data.get("data")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        yield ("model", "path"), model["path"]
    for section in ("train", "eval"):
        sources = sections.get(section) if isinstance(sections, dict) else None
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            for key in ("path", "root"):
                if isinstance(source, dict) and isinstance(source.get(key), str):
                    yield ("data", section, i, key), source[key]
