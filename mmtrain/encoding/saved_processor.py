"""What the processor saved with an adapter or a model has in place of that of a config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.schema import Model
from mmtrain.encoding.directory import load_image_processor, model_directory
from mmtrain.encoding.load import read_template
from mmtrain.encoding.processor_settings import TEMPLATE_FILE, image_settings_in, json_object
from mmtrain.safe_text import shortened, visible


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
    found = [json_object(path).get("chat_template") for path in sorted(folder.glob("*.json"))]
    return {str(one) for one in found if one is not None}
