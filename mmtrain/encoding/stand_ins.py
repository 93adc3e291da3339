"""Conversations whose texts are stand-ins: what a chat template makes of one shows what it writes around the texts."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mmtrain.records.chat import Messages


class Marks(NamedTuple):
    """What is around the reasoning at the beginning of a text: `<think>` and `</think>`, with white space."""

    opening: str
    close: str


Content = str | Marks
"""A part of a turn: "text", "image", or a text that begins with reasoning, which the template writes in its own way."""
Form = tuple[tuple[str, tuple[Content, ...]], ...]
"""What the template's own text depends on: each turn's role and its parts."""
STAND_IN = re.compile(r"Zq(\d+)qZ")


def stand_in(number: int) -> str:
    """What stands for the text with this number."""
    return f"Zq{number}qZ"


def reasoned_text(marks: Marks, reasoning: int, reply: int) -> str:
    """The stand-ins of a reply that begins with reasoning."""
    return f"{marks.opening}{stand_in(reasoning)}{marks.close}{stand_in(reply)}"


def marks_of(form: Form, turn: int) -> Marks | None:
    """The marks of the reasoning in a turn; None where it has none."""
    return next((kind for kind in form[turn][1] if isinstance(kind, Marks)), None)


def numbered(form: Form) -> Iterator[tuple[int, bool]]:
    """The turn of each stand-in, and whether it is for reasoning."""
    for turn, (_, kinds) in enumerate(form):
        for kind in kinds:
            if isinstance(kind, Marks):
                yield turn, True
            if kind != "image":
                yield turn, False


def stand_ins(form: Form) -> Messages:
    """A conversation of this form, in the shape that chat templates take."""
    number = 0
    messages: Messages = []
    for role, kinds in form:
        content: list[dict[str, str]] = []
        for kind in kinds:
            if kind == "image":
                content.append({"type": "image"})
            elif isinstance(kind, Marks):
                content.append({"type": "text", "text": reasoned_text(kind, number, number + 1)})
                number += 2
            else:
                content.append({"type": "text", "text": stand_in(number)})
                number += 1
        messages.append({"role": role, "content": content})
    return messages
