"""The model's own tokenizer, chat template and image processor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from mmtrain.encoding.directory import DirectoryParts
from mmtrain.encoding.fast_template import chat_template, renderer
from mmtrain.encoding.image_processor import ImageProcessor, ImageTokens
from mmtrain.encoding.image_runner import TYPE_KEYS
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.template import ChatTemplate, image_frame, probe_template
from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.records.chat import SampleError


@dataclass(frozen=True, slots=True)
class EncodingTrial:
    """What came of a few conversations that were encoded here and by the model's own processor, by what is in them."""

    equal: list[str]
    """Their ids are those of the model's own `apply_chat_template`."""
    alone: list[str]
    """The same for each reply after the prompt for it: the template writes replies in another way once others follow,
    or than for inference."""
    refused: dict[str, str]
    """With the reason: samples like them are refused too."""

    def lines(self) -> Iterator[str]:
        if self.equal:
            yield f"equal the model's own with {', '.join(self.equal)}"
        if self.alone:
            yield f"equal it for each reply alone, after the prompt for it, with {', '.join(self.alone)}"
        for name, reason in self.refused.items():
            yield f"refused with {name}: {reason}"

    def summary(self) -> Iterator[str]:
        """The same, with the number of those that are equal in place of their names."""
        num = len(self.equal) + len(self.alone) + len(self.refused)
        yield f"equal the model's own in {len(self.equal)} of {num} trial conversations, which inspect-model names"
        yield from list(self.lines())[bool(self.equal) :]


@dataclass(frozen=True, slots=True)
class ChatProcessor:
    """Renders conversations, turns text into ids and images into tensors, as inference does."""

    tokenizer: Tokenizer
    template: ChatTemplate
    images: ImageProcessor | None
    """None for a model that takes no images."""
    given_template: str | None = None
    """The text of `model.chat_template`, where it is given."""
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    """`model.image_processor`."""
    trial: EncodingTrial | None = None
    """None where another process tried it."""
    origin: tuple[str, ProcessorSettings] | None = None
    """The arguments with which `load_processor` loads it again in another process."""

    @property
    def image_token_id(self) -> int | None:
        """The token whose place an image's features take."""
        return None if self.images is None else self.images.token_id

    @property
    def grid_key(self) -> str | None:
        """The name of the tensor with each image's number of patches in time, height and width."""
        return None if self.images is None else self.images.traits.grid_key

    @property
    def needs_image(self) -> bool:
        """Whether a sample must have an image."""
        return self.images is not None and self.images.traits.needs_image

    @property
    def type_keys(self) -> frozenset[str]:
        """The token types that the model is given, by the names of `TYPE_KEYS`: those that its own processor or
        tokenizer makes. Some models have others, which they take for something else where they are zero."""
        if self.images is None:
            return frozenset(self.tokenizer.wrapped.model_input_names) & frozenset(TYPE_KEYS)
        return self.images.traits.type_keys

    @property
    def marks_replies(self) -> bool:
        """See `ImageTraits.marks_replies`."""
        return self.images is not None and self.images.traits.marks_replies

    @property
    def lays_out_together(self) -> bool:
        """Whether the images of several samples can be laid out at once; see `ImageTraits.together`."""
        return self.images is None or self.images.traits.together

    def image_inputs(
        self, samples: Sequence[Sequence[PIL.Image.Image]], ids: Sequence[int] | None = None, raw: bool = False
    ) -> tuple[dict[str, Any], list[int]]:
        """See `ImageProcessor.inputs`. Raises SampleError for a model that takes no images."""
        return self._image_processor().inputs(samples, ids, raw)

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageTokens, ...]:
        """The spans of the images of one sample, whose sizes are (width, height). Raises SampleError for a model that
        takes no images."""
        return self._image_processor().tokens(sizes) if sizes else ()

    def _image_processor(self) -> ImageProcessor:
        if self.images is None:
            raise SampleError("this model takes no images")
        return self.images


def make_processor(parts: DirectoryParts) -> ChatProcessor:
    """The processor, probed. Raises UserError or SampleError where training on what it makes would be wrong."""
    family = parts.processor
    image_token = None if family is None else family.image_token
    tokenizer = Tokenizer(parts.tokenizer, parts.eos_ids, family)
    source = chat_template(tokenizer.wrapped, family)
    render = renderer(tokenizer.wrapped, source)
    traits = probe_template(source, render, image_token)
    images = None
    if family is not None:
        frame = image_frame(render, traits, family.image_token, tokenizer.traits.special_tokens)
        images = ImageProcessor(family, tokenizer, parts.image_token_id, frame)
    around, end = (("", ""), "") if images is None else (images.traits.text_around, images.traits.text_end)
    template = ChatTemplate(str(source), traits, render, image_token, around, end)
    return ChatProcessor(tokenizer, template, images)
