"""From a YAML file and `key=value` overrides to a `Config`, or to all faults at once, each with its line."""

import difflib
import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmtrain.config.schema import Config, Frozen, Full, Lora
from mmtrain.config.yaml_file import KeyPath, parse_yaml, read_yaml
from mmtrain.errors import UserError, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MODES: dict[str, type[BaseModel]] = {"frozen": Frozen, "lora": Lora, "full": Full}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a config. Raises UserError with every fault found, one line each."""
    data, lines = read_yaml(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}:1: expected sections (model, tune, data, labels, train), not {shown(data)}")
    where = {at: f"{path}:{line}" for at, line in lines.items()}
    for override in overrides:
        _apply(override, data, where)
    faults = list(_missing_files(data, where, str(path)))
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults = [_fault(item, data, where, str(path)) for item in error.errors()] + faults
    if faults:
        raise UserError(faults)
    return config


def dump_config(config: Config) -> str:
    """The merged config as YAML, every key written out; loading it gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(override: str, data: dict[str, Any], where: dict[KeyPath, str]) -> None:
    """Set one `section.key=value` in `data`; a number in the path is a place in a list."""
    key, equals, text = override.partition("=")
    name = f"command line: {shown(override)}"
    if not equals or not key:
        raise UserError(f"{name}: expected section.key=value")
    value, _ = parse_yaml(text, name)
    steps: list[str | int] = [int(word) if word.isdecimal() else word for word in key.split(".")]
    target: Any = data
    for step, following in itertools.pairwise(steps):
        if isinstance(target, list) and isinstance(step, int) and step < len(target):
            target = target[step]
        elif isinstance(target, dict):
            if not isinstance(target.get(str(step)), dict | list):
                target[str(step)] = [] if isinstance(following, int) else {}
            target = target[str(step)]
        else:
            raise UserError(f"{name}: there is no {shown(step)} in the config")
    last = steps[-1]
    if isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = value
    elif isinstance(target, dict):
        target[str(last)] = value
    else:
        raise UserError(f"{name}: there is no {shown(last)} in the config")
    where[tuple(steps)] = "command line"


def _fault(item: Any, data: dict[str, Any], where: dict[KeyPath, str], name: str) -> str:
    at = _key_path(item["loc"], data)
    return f"{_place(at, where, name)}: {'.'.join(map(str, at)) or 'config'}: {_reason(item, at, data)}"


def _place(at: KeyPath, where: dict[KeyPath, str], name: str) -> str:
    """Where the key path `at`, or the nearest section around it, was written."""
    return next((where[at[:n]] for n in range(len(at), 0, -1) if at[:n] in where), f"{name}:1")


def _key_path(loc: tuple[str | int, ...], data: Any) -> KeyPath:
    """pydantic's location without the names of union members (`lora`, …) that it puts among the keys.

    Only the last step of a location may name a key that is not in the data: one that is missing.
    """
    path: list[str | int] = []
    here = data
    for i, step in enumerate(loc):
        known = step in here if isinstance(here, dict) else isinstance(here, list) and isinstance(step, int)
        if known:
            here = here[step]
            path.append(step)
        elif i == len(loc) - 1 and isinstance(here, dict) and not (step in _MODES and "mode" in here):
            path.append(step)
    return tuple(path)


def _reason(item: Any, at: KeyPath, data: dict[str, Any]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(str(at[-1]), _valid_keys(at, data))}"
    if kind == "missing":
        return "required, and not given"
    if kind.startswith("union_tag"):
        mode = value.get("mode") if isinstance(value, dict) else value
        return "needs `mode: frozen`, `mode: lora` or `mode: full`" + (f", not {shown(mode)}" if mode else "")
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
        annotation = model.model_fields[str(step)].annotation
        if step in ("vision", "projector", "language"):
            model = _MODES.get(here.get("mode"), Frozen)
        else:
            model = next(kind for kind in _models_in(annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def _nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"; did you mean {shown(near[0])}?" if near else f"; expected one of {', '.join(valid)}"


def _missing_files(data: dict[str, Any], where: dict[KeyPath, str], name: str) -> Iterator[str]:
    """A fault for each path in the raw config that leads nowhere; what is not a path at all is left to the schema."""
    for at, path in _paths(data):
        exists = Path(path).exists() or (at[-1] == "path" and bool(glob.glob(path, recursive=True)))
        if at == ("model", "path"):
            exists = Path(path).is_dir() or _HUB_ID.fullmatch(path) is not None
        if not exists:
            expected = "expected a model directory or a hub id; " if at == ("model", "path") else ""
            yield f"{_place(at, where, name)}: {'.'.join(map(str, at))}: {expected}there is no {shown(path)}"


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
