"""Conversations whose texts are stand-ins: what a chat template makes of one shows what it writes around the texts."""

import re
from collections.abc import Iterator

from mmtrain.records.chat import Messages
from mmtrain.records.reasoning import CLOSE, OPEN

Form = tuple[tuple[str, tuple[str, ...]], ...]
"""What the template's own text depends on: each turn's role and the kinds of its parts (text, image, or reasoned: a
text that begins with reasoning, which the template writes in its own way)."""
STAND_IN = re.compile(r"Zq(\d+)qZ")


def stand_in(number: int) -> str:
    """What stands for the text with this number."""
    return f"Zq{number}qZ"


def reasoned_text(reasoning: int, reply: int) -> str:
    """The stand-ins of a reply that begins with reasoning."""
    return f"{OPEN}\n{stand_in(reasoning)}\n{CLOSE}\n\n{stand_in(reply)}"


def numbered(form: Form) -> Iterator[tuple[int, bool]]:
    """The turn of each stand-in, and whether it is for reasoning."""
    for turn, (_, kinds) in enumerate(form):
        for kind in kinds:
            if kind == "reasoned":
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
                continue
            text = reasoned_text(number, number + 1) if kind == "reasoned" else stand_in(number)
            content.append({"type": "text", "text": text})
            number += 1 + (kind == "reasoned")
        messages.append({"role": role, "content": content})
    return messages
