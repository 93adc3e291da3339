"""Makes a `Config` from a YAML file and `key=value` overrides, or reports all faults at once, each with its line."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmtrain.config.data_section import in_full
from mmtrain.config.faults import schema_faults
from mmtrain.config.other_tools import INSTEAD
from mmtrain.config.schema import Config
from mmtrain.config.yaml_file import KeyPath, dump_yaml, parse_yaml, read_yaml
from mmtrain.errors import UserError
from mmtrain.safe_text import one_line, shown, visible

_HUB_ID = re.compile(r"(?!.*(--|\.\.))(?=.{3,96}$)[A-Za-z0-9](?:[\w.-]*\w)?/(?:[\w.-]*\w)", re.ASCII)
"""A valid model id of the hub: `owner/name`."""
_COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a config. Raises UserError with every fault found, one line each."""
    data, lines = read_yaml(path)
    file = visible(str(path))
    if data is None and not overrides:
        raise UserError(f"{file}: it is empty: expected a config, such as `mmtrain init` writes")
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{file}:1: expected sections (model, tune, data, labels, train, run), not {shown(data)}")
    where = {at: f"{file}:{line}" for at, line in lines.items()}
    faults = []
    if data.keys() & INSTEAD.keys() and not data.keys() & Config.model_fields.keys():
        faults.append(f"{file}: not a config of mmtrain: docs/other-tools.md shows one next to that of another tool")
    _write_sources_in_full(data)
    for override in overrides:
        try:
            _apply(override, data, where)
            _write_sources_in_full(data)
        except UserError as error:
            faults += error.faults
    name = f"{file}:1"
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults += [_fault(at, why, where, name) for at, why in schema_faults(error.errors(), data)]
    faults += _missing_files(data, where, name)
    if faults:
        raise UserError(faults)
    return config


def config_of_run(file: Path) -> Config:
    """The config that a run wrote, without the check of paths: the data may have moved since. Raises UserError."""
    try:
        return Config.model_validate(read_yaml(file)[0])
    except ValidationError as error:
        raise UserError(f"{visible(str(file))}: not the config of a run: {one_line(error)}") from None


def dump_config(config: Config) -> str:
    """The merged config as YAML with every key. Loading it gives an equal `Config`."""
    return dump_yaml(config.model_dump(mode="json"))


def _write_sources_in_full(data: dict[str, Any]) -> None:
    """So that overrides, such as data.train.0.weight=2, and faults can name the keys of every source."""
    sections = data.get("data")
    if isinstance(sections, dict):
        for key in ("train", "eval"):
            if key in sections:
                sections[key] = in_full(sections[key])


def _apply(override: str, data: dict[str, Any], where: dict[KeyPath, str]) -> None:
    """Set one `section.key=value` in `data`. A number in the path is the index in an existing list."""
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
        if not isinstance(target.get(step) if isinstance(target, dict) else target[step], dict | list):
            target[step] = {}
            where[tuple(at)] = _COMMAND_LINE
        target = target[step]
    at.append(step := _step(last, target, name))
    target[step] = value
    for inner in [inner for inner in where if inner[: len(at)] == tuple(at)]:
        del where[inner]  # the lines of values that the override replaced
    where[tuple(at)] = _COMMAND_LINE


def _step(word: str, target: Any, name: str) -> str | int:
    """One step of a key path: the key of a section or the index in a list."""
    if isinstance(target, dict):
        return word
    if word.isdecimal() and len(word) < 6 and int(word) < len(target):
        return int(word)
    raise UserError(f"{name}: there is no {shown(word)} in a list of {len(target)}")


def _fault(at: KeyPath, why: str, where: dict[KeyPath, str], name: str) -> str:
    """A fault with its place and key. What is wrong with several keys of a section, or of the config, begins with one
    of them."""
    section = ".".join(map(str, at))
    begins_with_key = re.match(rf"{re.escape(section)}\.\w+" if at else r"\w+(\.\w+)*", why)
    if begins_with_key:
        return f"{_place(tuple(begins_with_key[0].split('.')), where, name)}: {why}"
    return f"{_place(at, where, name)}: {_key(at)}: {why}"


def _key(at: KeyPath) -> str:
    """A key path as printable text on one line."""
    words = (str(step) if re.fullmatch(r"[\w-]{1,40}", str(step)) else shown(step, 40) for step in at)
    return ".".join(words)


def _place(at: KeyPath, where: dict[KeyPath, str], name: str) -> str:
    """Where the key path `at`, or the nearest section around it, was written."""
    return next((where[at[:n]] for n in range(len(at), 0, -1) if at[:n] in where), name)


def _missing_files(data: dict[str, Any], where: dict[KeyPath, str], name: str) -> Iterator[str]:
    """A fault for each path in the raw config that does not exist. The schema checks what is not a path at all."""
    for at, given in _paths(data):
        path = os.path.expanduser(given)
        is_model = at == ("model", "path")
        if is_model:
            exists = os.path.isdir(path) or _HUB_ID.fullmatch(path) is not None
        elif at == ("model", "chat_template"):
            exists = os.path.isfile(path)
        else:
            is_found = path.startswith("hub:") or ("\0" not in path and bool(glob.glob(path)))
            exists = os.path.exists(path) or (at[-1] == "path" and is_found)
        if not exists:
            expected = "expected a model directory or a hub id; " if is_model else ""
            tried = "" if os.path.isabs(path) else f" (looked for {visible(os.path.join(os.getcwd(), path))})"
            tried += "; variables are not replaced in a config" if "$" in path else ""
            yield f"{_place(at, where, name)}: {_key(at)}: {expected}there is no {shown(path)}{tried}"


def _paths(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    model, sections = data.get("model"), data.get("data")
    for key in ("path", "chat_template", "adapter"):
        if isinstance(model, dict) and isinstance(model.get(key), str):
            yield ("model", key), model[key]
    for section in ("train", "eval"):
        sources = sections.get(section) if isinstance(sections, dict) else None
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            for key in ("path", "root") if isinstance(source, dict) else ():
                named = source.get(key) if isinstance(source.get(key), list) else [source.get(key)]
                yield from ((("data", section, i, key), path) for path in named if path and isinstance(path, str))
