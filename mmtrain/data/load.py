"""A model directory's chat processor, ready for use."""

from mmtrain.data.chat import SampleError
from mmtrain.data.direct import chat_template, through_wrapper
from mmtrain.data.directory import load_parts, model_directory
from mmtrain.data.family_trial import try_family
from mmtrain.data.processor import ChatProcessor
from mmtrain.data.template_trial import try_template
from mmtrain.errors import UserError


def load_processor(path: str, tried: bool = False) -> ChatProcessor:
    """The processor in a model directory or the local hub cache, checked.

    `tried`: another process has tried the template and the family's own ids already. Raises UserError, naming `path`.
    """
    directory = model_directory(path)
    try:
        parts = load_parts(directory)
        template = chat_template(parts.tokenizer, parts.processor)
        if not tried:
            try_template(template, through_wrapper(parts.tokenizer, template))
        processor = ChatProcessor(parts)
        processor.check()
        if not tried:
            try_family(processor)
    except (UserError, SampleError) as error:
        raise UserError(f"{path}: {error}") from None
    return processor
