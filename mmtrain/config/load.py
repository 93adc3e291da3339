"""From a YAML file and `key=value` overrides to a `Config`, or to all faults at once, each with its line."""

import difflib
import glob
import itertools
import re
from collections.abc import Sequence
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
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise UserError(_faults(error, data, where, str(path))) from None
    faults = _missing_files(config, where, str(path))
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


def _faults(error: ValidationError, data: dict[str, Any], where: dict[KeyPath, str], name: str) -> list[str]:
    return [_fault(item, data, where, name) for item in error.errors()]


def _fault(item: Any, data: dict[str, Any], where: dict[KeyPath, str], name: str) -> str:
    at = _key_path(item["loc"], data)
    place = next((where[at[:n]] for n in range(len(at), 0, -1) if at[:n] in where), f"{name}:1")
    key = ".".join(map(str, at)) or "config"
    return f"{place}: {key}: {_reason(item, at, data)}"


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
        return f"needs `mode: frozen`, `mode: lora` or `mode: full`, not {shown(value)}"
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


def _missing_files(config: Config, where: dict[KeyPath, str], name: str) -> list[str]:
    faults = []
    model = config.model.path
    if not Path(model).is_dir() and not _HUB_ID.fullmatch(model):
        place = where.get(("model", "path"), name)
        faults.append(f"{place}: model.path: expected a model directory or a hub id, and there is no {shown(model)}")
    for section, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for i, source in enumerate(sources):
            at: KeyPath = ("data", section, i)
            for key, path in (("path", source.path), ("root", source.root)):
                if (
                    path is not None
                    and not Path(path).exists()
                    and not (key == "path" and glob.glob(path, recursive=True))
                ):
                    place = next((where[p] for p in ((*at, key), at, at[:2]) if p in where), name)
                    faults.append(f"{place}: data.{section}.{i}.{key}: there is no {shown(path)}")
    return faults
