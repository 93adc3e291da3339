"""The family's image processor: an image's tensors, and its span of placeholders and structural tokens.

Nothing here knows a family of models: counts and the tokens around the placeholders come from running the family's own
processor.
"""

import copy
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line, shown

_PROBE_SIZE = (64, 64)
_BLANK = PIL.Image.new("RGB", _PROBE_SIZE)
_PROBE_SAMPLES = (((64, 64), (300, 60), (120, 50), (400, 500)), ((100, 70),))
"""(width, height) of the images of two samples."""
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
TEXT_KEYS = ("input_ids", "attention_mask", *TYPE_KEYS, "labels")


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


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs the family's processor on images alone."""

    processor: Any
    tokenizer: Tokenizer
    token_id: int | None
    separator: int | None
    frame: tuple[str, str] = ("", "")
    """The special token that the processor wants before the text that stands for an image, and that after it."""

    def run(
        self, samples: Sequence[Sequence[PIL.Image.Image]], raw: bool = False
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """The tensors for the images of some samples, and all the ids that the processor writes for each image, with
        ordinary text. `raw`: pixels of 8 bits."""
        options = _OPTIONS | (_RAW if raw else {})
        made = self.processor(
            text=[self._text(images) for images in samples], images=list(map(list, samples)), **options
        )
        rows, masks = made["input_ids"].tolist(), made["attention_mask"].tolist()
        inputs = _of_images(made, raw)
        spans = [
            span
            for images, row, mask in zip(samples, rows, masks, strict=True)
            for span in self._cut([id_ for id_, is_own in zip(row, mask, strict=True) if is_own], len(images))
        ]
        return inputs, spans

    def run_with(self, images: Sequence[PIL.Image.Image], ids: Sequence[int], raw: bool = False) -> dict[str, Any]:
        """The tensors for one sample, whose ids are given: those of the text depend on them. `raw`: see `run`."""
        own = copy.copy(self.processor)
        own.tokenizer = _GivenIds(self.processor.tokenizer, list(ids))
        made = own(text=[self._text(images)], images=[list(images)], **_OPTIONS | (_RAW if raw else {}))
        return _of_images(made, raw)

    def text_end(self) -> str:
        """What the processor writes after the text of a sample with an image."""
        if self.separator is None:
            return ""
        made = self.processor(text=[self._text([_BLANK])], images=[[_BLANK]], **_OPTIONS)
        ids: list[int] = made["input_ids"][0].tolist()
        return self.tokenizer.decode(ids[len(ids) - ids[::-1].index(self.separator) :])

    def needs_image(self) -> bool:
        try:
            self.processor(text=["word"], **_OPTIONS)
        except Exception:  # a family that does not can raise anything
            return True
        return False

    def token_types(self) -> dict[str, Tensor]:
        """The types of the tokens of a sample with an image, by the names of `TYPE_KEYS`."""
        made = self.processor(text=[self._text([_BLANK])], images=[[_BLANK]], **_OPTIONS)
        return {key: made[key] for key in TYPE_KEYS if key in made}

    def _text(self, images: Sequence[PIL.Image.Image]) -> str:
        separator = "" if self.separator is None else self.tokenizer.traits.added[self.separator]
        before, after = self.frame
        token = f"{before}{self.processor.image_token}{after}"
        return separator + (token + separator) * len(images)

    def _cut(self, ids: list[int], num_images: int) -> list[list[int]]:
        """The ids of each image in those of a sample."""
        before, after = (int(bool(token)) for token in self.frame)
        if self.separator is None:
            return [ids[before : len(ids) - after]]
        cuts = [i for i, id_ in enumerate(ids) if id_ == self.separator]
        if len(cuts) != num_images + 1:
            raise SampleError("the model's processor changes the special tokens around an image")
        return [ids[start + 1 + before : end - after] for start, end in itertools.pairwise(cuts)]

    def blank(self, sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], list[list[int]]]:
        """`run` on one sample of blank images of these sizes (width, height)."""
        try:
            return self.run([[PIL.Image.new("RGB", size) for size in sizes]])
        except SampleError:
            raise
        except Exception as error:  # such as an aspect ratio that the family refuses
            what = "an image of" if len(sizes) == 1 else "images of"
            named = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise SampleError(f"the model's image processor refuses {what} {named}: {one_line(error)}") from None

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


_OPTIONS: dict[str, Any] = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
"""Padding is always on: it is a state of the tokenizer, which threads share."""
_RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False}


class _GivenIds:
    """A tokenizer that makes given ids of any one text."""

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._ids], "attention_mask": [[1] * len(self._ids)]}


def _of_images(made: Any, raw: bool) -> dict[str, Any]:
    """The tensors for images among all that the processor made."""
    found = {key: _widened(value) for key, value in made.items() if key not in TEXT_KEYS}
    pixels = [key for key, value in found.items() if key.startswith("pixel") and value.is_floating_point()]
    return found | {key: found[key].to(torch.uint8) for key in pixels} if raw else found


def _widened(value: Any) -> Any:
    """Pixels in float32, which is exact: some families give fewer bits, whatever the model computes in."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _find_separator(tokenizer: Tokenizer, image_token: str, token_id: int | None) -> int | None:
    """A special token that takes nothing of the text around it, to distinguish images in the processor's output."""
    tokens, traits = tokenizer.wrapped.added_tokens_decoder, tokenizer.traits
    parting = [id_ for id_, t in tokens.items() if t.special and traits.parting_tokens.fullmatch(t.content)]
    candidates = [id_ for id_ in parting if tokens[id_].content != image_token and id_ != token_id]
    preferred = [id_ for id_ in candidates if id_ in traits.eos_ids] or candidates
    return preferred[0] if preferred else None


def _probe_images(runner: _Runner) -> ImageTraits:
    """Raises UserError where there is no placeholder for an image, SampleError where the processor refuses one."""
    inputs, (ids,) = runner.blank([_PROBE_SIZE])
    if runner.token_id not in ids:
        raise UserError(f"the image processor lays out no placeholder {shown(runner.processor.image_token)}")
    grid_key = next((key for key in inputs if key.endswith("_thw")), None)
    patch = None if grid_key is None else int(runner.processor.image_processor.patch_size)
    num_pixels = _num_pixels(inputs) if patch is None else patch**2 * int(inputs[str(grid_key)].prod())
    count = sum(id_ == runner.token_id for id_ in ids)
    per_token = num_pixels / count if num_pixels else None
    types = runner.token_types()
    return ImageTraits(
        text_around=runner.text_around(ids),
        grid_key=grid_key,
        pixels_per_token=per_token,
        by_sample=_is_by_sample(runner),
        text_end=runner.text_end(),
        needs_image=runner.needs_image(),
        type_keys=frozenset(types),
        marks_replies="token_type_ids" in types and not types["token_type_ids"].any(),
        together=_are_together(runner),
    )


def _refuses(runner: _Runner) -> bool:
    """Whether the processor refuses an image."""
    try:
        runner.blank([_PROBE_SIZE])
    except SampleError:
        return True
    return False


def _is_by_sample(runner: _Runner) -> bool:
    """Whether the images of one sample have other spans than each has alone."""
    try:
        return runner.blank(_PROBE_SAMPLES[0])[1] != [runner.blank([size])[1][0] for size in _PROBE_SAMPLES[0]]
    except SampleError:  # the family takes one image a sample, or only images of one size in a sample
        return True


def _are_together(runner: _Runner) -> bool:
    """Whether two samples can be laid out at once, and no tensor for the images depends on the text."""
    samples = [[PIL.Image.new("RGB", size) for size in sizes] for sizes in _PROBE_SAMPLES]
    try:
        inputs, _ = runner.run(samples)
        of_images = runner.processor.image_processor(samples[0], return_tensors="pt")
    except Exception:  # a family that cannot can raise anything; each sample is then laid out alone
        return False
    return set(inputs) <= set(of_images)


def _num_pixels(inputs: dict[str, Any]) -> int | None:
    shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
    is_image = bool(shapes) and len(shapes[0]) >= 4  # (..., colours, height, width), not patches
    return math.prod(shapes[0]) // shapes[0][-3] if is_image else None


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
        self._runner = _Runner(processor, tokenizer, token_id, _find_separator(tokenizer, self.token, token_id))
        if _refuses(self._runner) and any(frame):
            self._runner = replace(self._runner, frame=frame)
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
        shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
        if not shapes or len(shapes[0]) < 4:  # patches without a position
            return size, None
        height, width = shapes[0][-2:]
        side = math.isqrt(count)
        return (width, height), (side, side) if side * side == count and width == height else None
