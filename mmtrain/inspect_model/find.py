"""A model is loaded and tried as at the start of a training: what was found, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmtrain.config.schema import Model
from mmtrain.encoding.layout import Layout
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor, EncodingTrial
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.inspect_model.trainable_components import ComponentFound, find_components
from mmtrain.model.family import probe_family
from mmtrain.model.image_cache.features import find_fields
from mmtrain.model.load import load_model
from mmtrain.model.packing_trial import try_rows
from mmtrain.records.chat import Conversation, Message, Role, SampleError, Text
from mmtrain.runtime.device import has_bfloat16
from mmtrain.runtime.processes import Runtime

SIZES = ((336, 336), (1000, 1000))
"""(width, height) of the images whose tokens are counted."""
_EXCHANGE: tuple[Role, ...] = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class ImagesFound:
    placeholder: str
    num_tokens: dict[str, int | str]
    """By "WIDTHxHEIGHT": the tokens of an image, or why it is refused."""
    num_placeholders: dict[str, int]


@dataclass(frozen=True, slots=True)
class TemplateFound:
    text_roles: list[str]
    """The roles whose content is given as a string."""
    takes_system: bool
    generation_prompt: str | None
    reply_end: str | None
    """What the template writes at the end of a reply that stops generation; None where it writes nothing."""
    added_end: str | None
    """The token that is put there where the template has none."""


@dataclass(frozen=True, slots=True)
class ModelFound:
    """Everything that is printed."""

    path: str
    model_class: str
    dtype: str
    components: list[ComponentFound]
    images: ImagesFound | None
    template: TemplateFound
    encoding: EncodingTrial | None
    head: str
    packing: str | None
    """Why samples do not share a row; None where they do."""
    image_cache: str | None
    """Why features of images are not cached; None where they are."""


def find(path: str, say: Callable[[str], None], chat_template: str | None = None) -> ModelFound:
    """Load the model at `path`, in the dtype that a config has by default (float32 where the device lacks it), and try
    it.

    `chat_template`: the file with the chat template in place of the model's own. `say` is given the
    lines of what falls back. Raises UserError where the model cannot be trained at all.
    """
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = Model(path=path).dtype if has_bfloat16(gpu) else "float32"
    processor, runtime = load_processor(path, ProcessorSettings(chat_template)), Runtime(dtype)
    model = load_model(path, dtype, processor)
    family = probe_family(model, processor, say)
    model.requires_grad_(False)
    components = list(find_components(path, model, family.components))
    model.to(runtime.device)
    packing = try_rows(model, processor, getattr(torch, dtype)).fault
    with runtime.autocast():
        fields = find_fields(model, processor)
    return ModelFound(
        path=path,
        model_class=type(model).__name__,
        dtype=dtype,
        components=components,
        images=_images(processor),
        template=_template(processor),
        encoding=processor.trial,
        head=family.head_kind,
        packing=packing,
        image_cache=fields if isinstance(fields, str) else None,
    )


def _images(processor: ChatProcessor) -> ImagesFound | None:
    if processor.images is None:
        return None
    num_tokens: dict[str, int | str] = {}
    num_placeholders: dict[str, int] = {}
    for width, height in SIZES:
        name = f"{width}x{height}"
        try:
            (tokens,) = processor.images.tokens([(width, height)])
        except SampleError as error:
            num_tokens[name] = str(error)
        else:
            num_tokens[name], num_placeholders[name] = len(tokens.ids), tokens.num_placeholders
    return ImagesFound(processor.images.placeholder, num_tokens, num_placeholders)


def _template(processor: ChatProcessor) -> TemplateFound:
    traits, tokenizer = processor.template.traits, processor.tokenizer
    end = _reply_end(processor)
    eos_id = tokenizer.traits.eos_id
    added = None if end is not None or eos_id is None else tokenizer.decode([eos_id])
    return TemplateFound(sorted(traits.text_roles), traits.takes_system, traits.generation_prompt, end, added)


def _reply_end(processor: ChatProcessor) -> str | None:
    """What the template writes after a reply, to the end of the token that stops generation."""
    layout, turns = Layout(processor), [Message(role, (Text(processor.template.reply("x")),)) for role in _EXCHANGE]
    conversation = Conversation(tuple(turns))
    form = layout.form(conversation)
    lay_out = layout.lay_out if layout.is_together(form, [1]) else layout.lay_out_alone
    skeleton = lay_out(conversation, form)[1]
    end = skeleton.replies[1].end
    return None if end is None else skeleton.pieces[end[0]].text[: end[1]]
