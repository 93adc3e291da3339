"""In which keys the configs of several runs differ."""

from collections.abc import Iterator, Sequence
from typing import Any


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each key whose values are not all equal, with the value in every config; `–` where a config lacks it.

    The directories of the runs are left out: they always differ.
    """
    flat = [dict(_leaves(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    sections = {section for key in keys for section in _sections_of(key)}  # a run without one has null there
    keys = dict.fromkeys(key for key in keys if key not in sections)
    rows = [(key, [_text(one[key]) if key in one else "–" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run.output_dir"]


def _sections_of(key: str) -> Iterator[str]:
    """The paths of the sections that `key` is in."""
    at = key.find(".")
    while at >= 0:
        yield key[:at]
        at = key.find(".", at + 1)


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The values below `value` that are no sections, each with its path, such as `data.train.0.path`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield at, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{at}.{key}".strip("."))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
