"""What a config sets in place of a model's own chat template and settings of its image processor."""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.config.schema import Model
from mmtrain.errors import UserError
from mmtrain.safe_text import shown
from mmtrain.text_files import json_object

TEMPLATE_FILE = "chat_template.jinja"
_NOT_SETTINGS = frozenset({"data_format", "device", "disable_grouping", "input_data_format", "return_tensors"})
"""Keys of transformers' image processors that say how one call is made, not what comes of it."""
_CLASS_KEYS = frozenset({"image_processor_type", "processor_class"})


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """Settings in place of the model's own."""

    chat_template: str | None = None
    """A file with the chat template, in Jinja."""
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    """Values of the image processor's keys, as in preprocessor_config.json."""

    @classmethod
    def of(cls, model: Model) -> "ProcessorSettings":
        return cls(model.chat_template, model.image_processor)


def known_settings(image_processor: Any) -> set[str]:
    """The keys of an image processor that decide what comes of an image."""
    known = {*getattr(image_processor.valid_kwargs, "__annotations__", ()), *image_processor.to_dict()}
    return known - _NOT_SETTINGS - _CLASS_KEYS


def check_image_settings(load: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any], directory: Path) -> None:
    """Raises UserError for a setting that a model's image processor does not have or that changes nothing.

    `load` makes the image processor with settings in place of its own.
    """
    plain, written = load({}), image_settings_in(directory)
    before, kind = plain.to_dict(), type(plain).__name__
    known = known_settings(plain)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise UserError(f"model.image_processor: {kind} has no key {shown(key)}; {hint}")
        if isinstance(before.get(key), bool) and not isinstance(value, bool):
            raise UserError(f"model.image_processor.{key}: expected true or false, not {shown(value)}")
        if written.get(key) != value and load({key: value}).to_dict() == before:
            raise UserError(
                f"model.image_processor.{key}: {shown(value)} changes nothing: it is what {kind} does already, or "
                f"another of the model's own settings decides ({', '.join(sorted(written.keys() - _CLASS_KEYS))})"
            )


def write_image_settings(folder: Path, given: Mapping[str, Any]) -> None:
    """Set them in the files of a processor in `folder`. Raises UserError, or OSError where one cannot be written."""
    found = _image_file(folder)
    if not given or found is None:
        return
    file, settings, own = found
    own.update(given)
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def image_settings_in(folder: Path) -> dict[str, Any]:
    """What the files of a processor in `folder` set for its image processor. Raises UserError."""
    found = _image_file(folder)
    return {} if found is None else found[2]


def _image_file(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The file that transformers reads the image processor's settings from, all that is in it, and these settings."""
    both = folder / "processor_config.json"
    settings = json_object(both) if both.is_file() else {}
    if isinstance(settings.get("image_processor"), dict):
        return both, settings, settings["image_processor"]
    own = folder / "preprocessor_config.json"
    if not own.is_file():
        return None
    settings = json_object(own)
    return own, settings, settings
