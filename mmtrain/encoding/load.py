"""A model directory's chat processor, ready for use."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtrain.config.schema import Model
from mmtrain.encoding.directory import load_parts, model_directory
from mmtrain.encoding.family_trial import try_family
from mmtrain.encoding.fast_template import chat_template, through_wrapper
from mmtrain.encoding.processor import ChatProcessor, make_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.template_trial import try_template
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown, visible
from mmtrain.text_files import read_text

_NONE = ProcessorSettings()
_ORDINARY_TEXT = ("The quick brown fox jumps over the lazy dog.", "What is 12 + 30? It is 42!")


def load_processor(path: str, settings: ProcessorSettings = _NONE, tried: bool = False) -> ChatProcessor:
    """The processor in a model directory or the local hub cache, checked.

    `settings`: in place of the model's own. `tried`: another process has tried the template and the family's own ids
    already. Raises UserError, naming `path`.
    """
    directory, template_file = model_directory(path), settings.chat_template
    given = None if template_file is None else read_template(Path(template_file))
    try:
        parts = load_parts(directory, given, settings.image_processor)
        _check_tokenizer(parts.tokenizer)
        template = chat_template(parts.tokenizer, parts.processor)
        if not tried:
            try_template(template, through_wrapper(parts.tokenizer, template))
        processor = replace(
            make_processor(parts),
            given_template=given,
            image_settings=settings.image_processor,
            origin=(path, settings),
        )
        return processor if tried else replace(processor, trial=try_family(processor))
    except (UserError, SampleError) as error:
        raise UserError(f"{_named(path, settings, str(error))}: {error}") from None


def processor_of(model: Model, tried: bool = False) -> ChatProcessor:
    """`load_processor` for the model of a config, with what it sets in place of the model's own."""
    return load_processor(model.path, ProcessorSettings.of(model), tried)


def read_template(file: Path) -> str:
    """The text of a file with a chat template. Raises UserError where there is none in it."""
    name = visible(str(file))
    text = read_text(file, name)
    if not text.strip():
        raise UserError(f"{name}: it is empty: expected a chat template in Jinja")
    return text


def _check_tokenizer(tokenizer: Any) -> None:
    """Raises UserError where ordinary text does not survive: labels made with such a tokenizer would be wrong."""
    for text in _ORDINARY_TEXT:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if back.strip() != text:
            missing = "" if back.strip() else "; is tokenizer.json missing?"
            raise UserError(
                f"the tokenizer does not give back ordinary text: {shown(text)} came back as {shown(back)}{missing}"
            )


def _named(path: str, settings: ProcessorSettings, reason: str) -> str:
    """The model, with what a config sets in place of its own, unless the reason already names it."""
    words = [] if settings.chat_template is None else [f"the chat template {visible(settings.chat_template)}"]
    if "model.image_processor" not in reason:
        words += [f"model.image_processor.{key}: {shown(value)}" for key, value in settings.image_processor.items()]
    return f"{path} with {', '.join(words)}" if words else path
