"""Runs a family's own processor on images without a conversation."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line

PROBE_SIZE = (64, 64)
"""(width, height)"""
_BLANK = PIL.Image.new("RGB", PROBE_SIZE)
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
"""Tensors that say which tokens are of images, or of replies."""
TEXT_KEYS = ("input_ids", "attention_mask", *TYPE_KEYS, "labels")
"""Tensors that a processor makes of the text."""


@dataclass(frozen=True, slots=True)
class ImageRunner:
    """Runs the family's processor on images alone."""

    processor: Any
    tokenizer: Tokenizer
    token_id: int | None
    """The token whose place an image's features take."""
    separator: int | None
    """A special token that is put between images, to distinguish them in what the processor makes; see
    `find_separator`."""
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
        ids: list[int] = self._one_image()["input_ids"][0].tolist()
        return self.tokenizer.decode(ids[len(ids) - ids[::-1].index(self.separator) :])

    def needs_image(self) -> bool:
        try:
            self.processor(text=["word"], **_OPTIONS)
        except Exception:  # a family that does not can raise anything
            return True
        return False

    def token_types(self) -> dict[str, Tensor]:
        """The types of the tokens of a sample with an image, by the names of `TYPE_KEYS`."""
        made = self._one_image()
        return {key: made[key] for key in TYPE_KEYS if key in made}

    def _one_image(self) -> Any:
        """What the processor makes of a sample with a blank image."""
        return self.processor(text=[self._text([_BLANK])], images=[[_BLANK]], **_OPTIONS)

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
    found = {key: widened(value) for key, value in made.items() if key not in TEXT_KEYS}
    pixels = [key for key, value in found.items() if key.startswith("pixel") and value.is_floating_point()]
    return found | {key: found[key].to(torch.uint8) for key in pixels} if raw else found


def widened(value: Any) -> Any:
    """Pixels in float32, which is exact: some families give fewer bits, whatever the model computes in."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def find_separator(tokenizer: Tokenizer, image_token: str, token_id: int | None) -> int | None:
    """A special token that takes nothing of the text around it, to distinguish images in the processor's output."""
    tokens, traits = tokenizer.wrapped.added_tokens_decoder, tokenizer.traits
    parting = [id_ for id_, t in tokens.items() if t.special and traits.parting_tokens.fullmatch(t.content)]
    candidates = [id_ for id_ in parting if tokens[id_].content != image_token and id_ != token_id]
    preferred = [id_ for id_ in candidates if id_ in traits.eos_ids] or candidates
    return preferred[0] if preferred else None
