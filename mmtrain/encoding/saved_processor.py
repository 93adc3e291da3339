"""The processor that is saved with an adapter or a model, next to that of its base model or of a config."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.schema import Model
from mmtrain.encoding.directory import files_in, load_image_processor, make_image_processor, model_directory
from mmtrain.encoding.load import read_template
from mmtrain.encoding.processor_settings import (
    TEMPLATE_FILE,
    ProcessorSettings,
    image_settings_in,
    known_settings,
)
from mmtrain.errors import UserError
from mmtrain.safe_text import shortened, visible
from mmtrain.text_files import json_object


def saved_settings(adapter: Path, model: str) -> ProcessorSettings:
    """Those with which the adapter in a directory was trained, where its processor is saved there. `model`: its base
    model. Raises UserError where they cannot be used with it."""
    template = adapter / TEMPLATE_FILE
    base, saved = model_directory(model), image_settings_in(adapter)
    changed = _changed(saved, base) if saved and image_settings_in(base) else {}
    if changed is None:
        raise UserError(
            f"{visible(str(adapter))}: its image processor is not that of {visible(model)}: "
            "copy its preprocessor_config.json into a copy of that model's directory, and use that one"
        )
    return ProcessorSettings(str(template) if template.is_file() else None, changed)


def _changed(saved: Mapping[str, Any], base: Path) -> dict[str, Any] | None:
    """The saved settings that make another image processor of the one in `base`; None where these do not make the one
    that was saved. transformers saves all of them, also those that the family has anyway."""
    plain = make_image_processor(base, {})
    before, known = plain.to_dict(), known_settings(plain)
    own = {key: value for key, value in saved.items() if key in known}
    wanted = type(plain).from_dict(copy.deepcopy(own)).to_dict()
    if wanted == before:
        return {}
    changed = {key: value for key, value in own.items() if make_image_processor(base, {key: value}).to_dict() != before}
    return changed if make_image_processor(base, changed).to_dict() == wanted else None


def differences(folder: Path, model: Model) -> list[str]:
    """Each key of the section model for which what is saved in `folder` was trained with something else than `model`
    says, with both values. Empty where no processor is saved there. Raises UserError where one of them is broken."""
    return [*_image_differences(folder, model), *_template_differences(folder, model)]


def _image_differences(folder: Path, model: Model) -> Iterator[str]:
    base = model_directory(model.path)
    saved, own = image_settings_in(folder), {**image_settings_in(base), **model.image_processor}
    if not saved or not own:
        return
    here = load_image_processor(base, model.image_processor)
    there = type(here).from_dict(saved)
    before, after = there.to_dict(), here.to_dict()
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:  # one may write out what the other leaves to the family
        return
    written = [key for key in saved if key in own and saved[key] != own[key]]
    for key in written or changed:
        was, now = (saved, own) if written else (before, after)
        yield f"model.image_processor.{key} was {_value(was, key)} and is {_value(now, key)}"


def _value(settings: Mapping[str, Any], key: str) -> str:
    return shortened(visible(str(settings[key])), 80) if key in settings else "not set"


def _template_differences(folder: Path, model: Model) -> Iterator[str]:
    saved, base = _templates(folder), _templates(model_directory(model.path))
    own = base if model.chat_template is None else {read_template(Path(model.chat_template))}
    if saved and saved != own:
        yield "model.chat_template was another one"


def _templates(folder: Path) -> set[str]:
    """The texts of the chat templates of the processor in `folder`."""
    file = folder / TEMPLATE_FILE
    if file.is_file():  # it is used before those in other files
        return {read_template(file)}
    files = files_in(folder, ("chat_template.json", "*processor_config.json", "tokenizer_config.json"))
    found = [json_object(path).get("chat_template") for path in files]
    return {str(one) for one in found if one is not None}
