"""Marks in a text that stand for images: which one a record uses, and the text around each.

One newline between a mark and the text next to it belongs to the mark, not to the text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmtrain.records.chat import SampleError

MARKS = (
    *("<image>", "<img>", "<IMG_CONTEXT>", "<|image|>", "[IMG]", "<ImageHere>", "<image_placeholder>"),
    *("<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>", "<image_1>"),
)
"""Those that are recognised, the most common first; the last stands for all with a number."""
_WITH_PATH = re.compile(r"<img>([^<>\n]{1,4096})</img>")
_NUMBERED = re.compile(r"<\|?image[_ -]?(\d{1,6})\|?>")


@dataclass(frozen=True, slots=True)
class Mark:
    """How a record marks its images."""

    text: str
    pattern: re.Pattern[str]
    first: int = 1
    """The number of the first image, where marks have numbers."""

    def split(self, text: str) -> Iterator[str | int]:
        """The texts between the marks, and for each mark its number (from 1), 0 where it has none."""
        at, after_mark = 0, False
        for match in self.pattern.finditer(text):
            yield from _trimmed(text[at : match.start()], after_mark, before_mark=True)
            yield int(match[1]) + 1 - self.first if self.pattern.groups else 0
            at, after_mark = match.end(), True
        yield from _trimmed(text[at:], after_mark, before_mark=False)


def split_at_paths(text: str) -> Iterator[str]:
    """The texts before, between and after `<img>path</img>`, the old form of Qwen-VL, and the paths: alternating, a
    text first."""
    pieces = _WITH_PATH.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            yield piece
        else:
            yield "".join(_trimmed(piece, after_mark=number > 0, before_mark=number < len(pieces) - 1))


def _trimmed(text: str, after_mark: bool, before_mark: bool) -> Iterator[str]:
    text = text.removeprefix("\n") if after_mark else text
    text = text.removesuffix("\n") if before_mark else text
    if text:
        yield text


def mark_called(text: str) -> Mark:
    """The mark that is written as `text`. The number in `<image_1>` or `<image_0>` is that of the first image."""
    if (numbered := _NUMBERED.fullmatch(text)) and int(numbered[1]) < 2:
        return Mark(text, _NUMBERED, int(numbered[1]))
    return Mark(text, re.compile(re.escape(text)))


_KNOWN = [mark_called(text) for text in MARKS]


def find_mark(texts: Sequence[str], num_images: int) -> Mark:
    """The mark that `texts` use for `num_images` images: `<image>` if it is in them, or if no other is.

    Raises SampleError if several others are.
    """
    if num_images and not any("<image>" in text for text in texts):
        found = [mark for mark in _KNOWN if any(mark.pattern.search(text) for text in texts)]
        if len(found) > 1:
            raise SampleError(
                f"{found[0].text} and {found[1].text} could both mark an image: set `image_mark` of the source"
            )
        if found:
            has_zero = any(int(number) == 0 for text in texts for number in _NUMBERED.findall(text))
            return replace(found[0], first=0) if has_zero else found[0]
    return _KNOWN[0]
