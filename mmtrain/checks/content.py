"""Checks of a sample's text and images that do not depend on its ids."""

from collections.abc import Iterator, Sequence

from mmtrain.checks.findings import CROPPED, LARGE, LITERAL, MARK, UNMARKED, Finding
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, Message
from mmtrain.safe_text import shown

MARKS = ("<image>", "<video>", "<audio>", "</img>")
"""Placeholders for media in the text of common formats; `<img>path</img>` is the old form of Qwen-VL."""

_LARGER, _OTHER_SHAPE = 4.0, 0.15


def image_notes(sizes: Sequence[tuple[int, int]], processor: ChatProcessor) -> Iterator[Finding]:
    """Images that the model sees much smaller than they are, or cropped; `sizes` are their (width, height) in order."""
    of_images = processor.image_tokens(sizes)
    for number, ((width, height), tokens) in enumerate(zip(sizes, of_images, strict=True), start=1):
        if len(tokens.ids) != tokens.num_placeholders:
            continue  # divided into tiles: the size of a tile is not that of the image
        used_width, used_height = tokens.used_size
        reason = f"image {number}: {width}x{height}, used as {used_width}x{used_height}"
        if width * height > _LARGER * used_width * used_height:
            yield Finding.note(LARGE, reason)
        shape = (width / height) / (used_width / used_height)
        if max(shape, 1 / shape) > 1 + _OTHER_SHAPE:
            yield Finding.note(CROPPED, reason)


def placed_images(conversation: Conversation) -> Iterator[Finding]:
    """Images that the record gives no place."""
    if conversation.has_unmarked_images:
        yield Finding.note(UNMARKED, "nothing says where its images are: they come first in the user's first turn")


def literal_specials(messages: Sequence[Message], processor: ChatProcessor) -> Iterator[Finding]:
    """Special tokens in the text of the conversation."""
    for turn, message in enumerate(messages, start=1):
        if match := processor.tokenizer.traits.special_tokens.search(message.text):
            yield Finding.note(LITERAL, f"turn {turn} has {shown(match.group())}, which is encoded as plain text")


def unmatched_marks(messages: Sequence[Message], marks: Sequence[str]) -> Iterator[Finding]:
    """Any of `marks` left in the text: the sample would be trained on without the image that the mark stands for."""
    for turn, message in enumerate(messages, start=1):
        text = message.text
        for mark in marks:
            if mark in text:
                what = f"turn {turn} has {mark!r} as text: give its image under 'images' or 'image'"
                yield Finding.fault(MARK, f"{what}, or name {mark!r} in data.ignore_fields")
