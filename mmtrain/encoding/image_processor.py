"""The family's image processor: an image's tensors, and its span of placeholders and structural tokens.

Nothing here knows a family of models: counts and the tokens around the placeholders come from running the family's own
processor.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line, shown

_PROBE_SIZE = (64, 64)
TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


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


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs the family's processor on images alone."""

    processor: Any
    tokenizer: Tokenizer
    token_id: int | None
    separator: int | None

    def run(self, images: Sequence[PIL.Image.Image]) -> tuple[dict[str, Any], list[list[int]]]:
        """The tensors, and all the ids that the processor writes for each image, ordinary text included."""
        token = self.processor.image_token
        separator = "" if self.separator is None else self.tokenizer.traits.added[self.separator]
        made = self.processor(
            text=[separator + (token + separator) * len(images)],
            images=[list(images)],
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids: list[int] = made["input_ids"][0].tolist()
        inputs = {key: value for key, value in made.items() if key not in TEXT_KEYS}
        if self.separator is None:
            return inputs, [ids]
        cuts = [i for i, id_ in enumerate(ids) if id_ == self.separator]
        if len(cuts) != len(images) + 1:
            raise SampleError("the model's processor changes the special tokens around an image")
        return inputs, [ids[start + 1 : end] for start, end in itertools.pairwise(cuts)]

    def blank(self, size: tuple[int, int]) -> tuple[dict[str, Any], list[int]]:
        """`run` on a blank image of `size` (width, height)."""
        try:
            inputs, (ids,) = self.run([PIL.Image.new("RGB", size)])
        except SampleError:
            raise
        except Exception as error:  # such as an aspect ratio that the family refuses
            raise SampleError(
                f"the model's image processor refuses an image of {size[0]}x{size[1]}: {one_line(error)}"
            ) from None
        return inputs, ids

    def span_of(self, ids: Sequence[int]) -> slice:
        """The span of an image in what the processor writes for it: from the first to the last placeholder or
        structural token. The rest is ordinary text, which the tokenizer may join with its neighbours."""
        added = self.tokenizer.traits.added
        own = [i for i, id_ in enumerate(ids) if id_ == self.token_id or added.get(id_, "").strip()]
        return slice(own[0], own[-1] + 1) if own else slice(0, len(ids))

    def text_around(self, ids: Sequence[int]) -> tuple[str, str]:
        """The ordinary text before and after the span in `ids`."""
        span = self.span_of(ids)
        return self.tokenizer.decode(ids[: span.start]), self.tokenizer.decode(ids[span.stop :])


def _find_separator(tokenizer: Tokenizer, image_token: str, token_id: int | None) -> int | None:
    """A special token that takes nothing of the text around it, to tell images apart in the processor's output."""
    tokens, traits = tokenizer.wrapped.added_tokens_decoder, tokenizer.traits
    parting = [id_ for id_, t in tokens.items() if t.special and traits.parting_tokens.fullmatch(t.content)]
    candidates = [id_ for id_ in parting if tokens[id_].content != image_token and id_ != token_id]
    preferred = [id_ for id_ in candidates if id_ in traits.eos_ids] or candidates
    return preferred[0] if preferred else None


def _probe_images(runner: _Runner) -> ImageTraits:
    """Raises UserError where there is no placeholder for an image, SampleError where the processor refuses one."""
    inputs, ids = runner.blank(_PROBE_SIZE)
    if runner.token_id not in ids:
        raise UserError(f"the image processor lays out no placeholder {shown(runner.processor.image_token)}")
    grid_key = next((key for key in inputs if key.endswith("_thw")), None)
    patch = None if grid_key is None else int(runner.processor.image_processor.patch_size)
    num_pixels = _num_pixels(inputs) if patch is None else patch**2 * int(inputs[str(grid_key)].prod())
    count = sum(id_ == runner.token_id for id_ in ids)
    return ImageTraits(runner.text_around(ids), grid_key, num_pixels / count if num_pixels else None)


def _num_pixels(inputs: dict[str, Any]) -> int | None:
    shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
    is_image = bool(shapes) and len(shapes[0]) >= 4  # (..., colours, height, width), not patches
    return math.prod(shapes[0]) // shapes[0][-3] if is_image else None


class ImageProcessor:
    """Turns images into tensors and ids, as inference does.

    `token` is the text that stands for an image in a conversation, `token_id` the token whose place an image's features
    take, and `placeholder` its text: the two texts can differ.
    """

    def __init__(self, processor: Any, tokenizer: Tokenizer, token_id: int | None) -> None:
        """`processor` is the family's own. Raises UserError or SampleError where it makes no placeholder."""
        self.processor = processor
        self.token: str = processor.image_token
        self.token_id = token_id
        self.placeholder = self.token if token_id is None else tokenizer.traits.added.get(token_id, self.token)
        self._runner = _Runner(processor, tokenizer, token_id, _find_separator(tokenizer, self.token, token_id))
        self.traits = _probe_images(self._runner)
        self.tokens = functools.lru_cache(maxsize=65536)(self._tokens)

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the colours (0 to 1) by which pixels are normalised."""
        own = self.processor.image_processor
        return own.image_mean, own.image_std

    def inputs(self, images: Sequence[PIL.Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """The tensors the model takes for `images`, and the ids of their spans, one after the other."""
        inputs, spans = self._runner.run(images)
        return inputs, [id_ for span in spans for id_ in span[self._runner.span_of(span)]]

    def _tokens(self, size: tuple[int, int]) -> ImageTokens:
        """The span of an image of `size` (width, height), from the family's processor run on a blank one."""
        inputs, ids = self._runner.blank(size)
        if self._runner.text_around(ids) != self.traits.text_around:
            raise SampleError(f"the model's processor writes other text around an image of {size[0]}x{size[1]}")
        count = ids.count(-1 if self.token_id is None else self.token_id)
        return ImageTokens(tuple(ids[self._runner.span_of(ids)]), count, *self._used(inputs, count, size))

    def _used(
        self, inputs: dict[str, Any], count: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size of the pixels used, and the grid of the placeholders over them; `size` where no tensor shows it."""
        if self.traits.grid_key is not None:
            _, rows, columns = (int(number) for number in inputs[self.traits.grid_key][0])
            patch, merge = int(self.processor.image_processor.patch_size), math.isqrt(rows * columns // count)
            return (columns * patch, rows * patch), (columns // merge, rows // merge)
        shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
        if not shapes or len(shapes[0]) < 4:  # patches without a position
            return size, None
        height, width = shapes[0][-2:]
        side = math.isqrt(count)
        return (width, height), (side, side) if side * side == count and width == height else None
