"""The family's image processor: an image's tensors, and its span of placeholders and structural tokens.

Nothing here knows a family of models: counts and the tokens around the placeholders come from running the family's own
processor.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image

from mmtrain.encoding.image_runner import PROBE_SIZE, ImageRunner, find_separator
from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line, shown

_PROBE_SAMPLES = (((64, 64), (300, 60), (120, 50), (400, 500)), ((100, 70),))
"""(width, height) of the images of two samples."""


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What stands for one image in the token sequence: placeholders, and any structural tokens among them."""

    ids: tuple[int, ...]
    num_placeholders: int
    used_size: tuple[int, int]
    """(width, height) of the pixels that the vision encoder sees; of one tile where the family makes several."""
    grid: tuple[int, int] | None
    """(columns, rows) in which the placeholders cover the image, None where they do not."""


@dataclass(frozen=True, slots=True)
class ImageTraits:
    """What is found out about an image processor, once."""

    text_around: tuple[str, str]
    """Ordinary text that it writes before and after an image's span, such as newlines."""
    grid_key: str | None
    """The name of the tensor with an image's number of patches in time, height and width; None where there is none."""
    pixels_per_token: float | None
    """Pixels that the vision encoder sees, all tiles together, for each placeholder; None where no tensor shows it."""
    by_sample: bool
    """Whether an image's span depends on the other images of its sample, as in families that number them."""
    text_end: str
    """Ordinary text that the processor writes after all of a text with images, such as a line break."""
    needs_image: bool
    """Whether it takes no text without an image."""
    type_keys: frozenset[str]
    """The token types that the processor gives the model, by the names of `TYPE_KEYS`."""
    marks_replies: bool
    """Whether the tokens of a reply have another type than those of the prompt for it, instead of those of images."""
    together: bool
    """Whether the images of several samples can be made into tensors at once. Where they cannot, or where a tensor
    depends on the text, each sample goes through the model alone."""


def _probe_images(runner: ImageRunner) -> ImageTraits:
    """Raises UserError where there is no placeholder for an image, SampleError where the processor refuses one."""
    inputs, (ids,) = runner.blank([PROBE_SIZE])
    if runner.token_id not in ids:
        token, named = runner.processor.image_token, runner.token_id
        id_ = runner.tokenizer.id_of(token)
        ids_differ = (
            f": it is token {id_} of the tokenizer, and {named} in config.json" if named not in (id_, None) else ""
        )
        raise UserError(f"the image processor lays out no placeholder {shown(token)}{ids_differ}")
    grid_key = next((key for key in inputs if key.endswith("_thw")), None)
    shape = _pixel_shape(inputs)
    num_pixels = 0 if shape is None else math.prod(shape) // shape[-3]
    if grid_key is not None:
        num_pixels = int(runner.processor.image_processor.patch_size) ** 2 * int(inputs[grid_key].prod())
    count = sum(id_ == runner.token_id for id_ in ids)
    types = runner.token_types()
    return ImageTraits(
        text_around=runner.text_around(ids),
        grid_key=grid_key,
        pixels_per_token=num_pixels / count if num_pixels else None,
        by_sample=_is_by_sample(runner),
        text_end=runner.text_end(),
        needs_image=runner.needs_image(),
        type_keys=frozenset(types),
        marks_replies="token_type_ids" in types and not types["token_type_ids"].any(),
        together=_are_together(runner),
    )


def _check_one_token(tokenizer: Tokenizer, placeholder: str) -> None:
    """Raises UserError where the tokenizer splits a placeholder."""
    num_tokens = len(tokenizer.encode(placeholder, None))
    if num_tokens != 1:
        raise UserError(
            f"the tokenizer splits the placeholder {shown(placeholder)} into {num_tokens} tokens: expected one: add it "
            "to added_tokens in tokenizer.json"
        )


def _refuses(runner: ImageRunner) -> bool:
    """Whether the processor refuses an image."""
    try:
        runner.blank([PROBE_SIZE])
    except SampleError:
        return True
    return False


def _is_by_sample(runner: ImageRunner) -> bool:
    """Whether the images of one sample have other spans than each has alone."""
    try:
        return runner.blank(_PROBE_SAMPLES[0])[1] != [runner.blank([size])[1][0] for size in _PROBE_SAMPLES[0]]
    except SampleError:  # the family takes one image a sample, or only images of one size in a sample
        return True


def _are_together(runner: ImageRunner) -> bool:
    """Whether two samples can be laid out at once, and no tensor for the images depends on the text."""
    samples = [[PIL.Image.new("RGB", size) for size in sizes] for sizes in _PROBE_SAMPLES]
    try:
        inputs, _ = runner.run(samples)
        of_images = runner.processor.image_processor(samples[0], return_tensors="pt")
    except Exception:  # a family that cannot can raise anything; each sample is then laid out alone
        return False
    return set(inputs) <= set(of_images)


def _pixel_shape(inputs: dict[str, Any]) -> tuple[int, ...] | None:
    """(..., colours, height, width); None where the pixels are patches without a position."""
    shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
    return shapes[0] if shapes and len(shapes[0]) >= 4 else None


class ImageProcessor:
    """Turns images into tensors and ids, as inference does.

    `token` is the text that stands for an image in a conversation, `token_id` the token whose place an image's features
    take, and `placeholder` its text: the two texts can differ.
    """

    def __init__(
        self, processor: Any, tokenizer: Tokenizer, token_id: int | None, frame: tuple[str, str] = ("", "")
    ) -> None:
        """`processor` is the family's own; `frame`: the special tokens that the chat template writes before and after
        the text that stands for an image. Raises UserError or SampleError where it makes no placeholder."""
        self.processor = processor
        self.token: str = processor.image_token
        self.token_id = token_id
        self.placeholder = self.token if token_id is None else tokenizer.traits.added.get(token_id, self.token)
        self._runner = ImageRunner(processor, tokenizer, token_id, find_separator(tokenizer, self.token, token_id))
        if _refuses(self._runner) and any(frame):
            self._runner = replace(self._runner, frame=frame)
        if _refuses(self._runner):
            _check_one_token(tokenizer, self.token)
        self.traits = _probe_images(self._runner)
        self._tokens = functools.lru_cache(maxsize=65536)(self._lay_out)

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the colours (0 to 1) by which pixels are normalised."""
        own = self.processor.image_processor
        return own.image_mean, own.image_std

    def inputs(
        self, samples: Sequence[Sequence[PIL.Image.Image]], ids: Sequence[int] | None = None, raw: bool = False
    ) -> tuple[dict[str, Any], list[int]]:
        """The tensors the model takes for the images of `samples`, and the ids of their spans, one after the other.

        `ids`: those of the sample, where there is one and `traits.together` is false. `raw`: pixels as 8-bit integers,
        neither rescaled nor normalized.
        """
        try:
            inputs, spans = self._runner.run(samples, raw)
            if ids is not None:
                inputs = self._runner.run_with(samples[0], ids, raw)
        except SampleError:
            raise
        except Exception as error:  # such as images that one sample cannot have together
            raise SampleError(f"the model's image processor refuses the images: {one_line(error)}") from None
        return inputs, [id_ for span in spans for id_ in span[self._runner.span_of(span)]]

    def tokens(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageTokens, ...]:
        """The spans of the images of one sample, whose sizes are (width, height)."""
        if self.traits.by_sample:
            return self._tokens(tuple(sizes))
        return tuple(tokens for size in sizes for tokens in self._tokens((size,)))

    def _lay_out(self, sizes: tuple[tuple[int, int], ...]) -> tuple[ImageTokens, ...]:
        """The spans of images of these sizes, from the family's processor run on blank ones."""
        inputs, spans = self._runner.blank(sizes)
        found = []
        for size, ids in zip(sizes, spans, strict=True):
            if self._runner.text_around(ids) != self.traits.text_around:
                raise SampleError(f"the model's processor writes other text around an image of {size[0]}x{size[1]}")
            count = ids.count(-1 if self.token_id is None else self.token_id)
            used = self._used(inputs, count, size) if len(sizes) == 1 else (size, None)
            found.append(ImageTokens(tuple(ids[self._runner.span_of(ids)]), count, *used))
        return tuple(found)

    def _used(
        self, inputs: dict[str, Any], count: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size of the pixels used, and the grid of the placeholders over them; `size` where no tensor shows it."""
        if self.traits.grid_key is not None:
            _, rows, columns = (int(number) for number in inputs[self.traits.grid_key][0])
            patch, merge = int(self.processor.image_processor.patch_size), math.isqrt(rows * columns // count)
            return (columns * patch, rows * patch), (columns // merge, rows // merge)
        shape = _pixel_shape(inputs)
        if shape is None:
            return size, None
        (height, width), side = shape[-2:], math.isqrt(count)
        return (width, height), (side, side) if side * side == count and width == height else None
