"""Conversations whose texts are stand-ins: what a chat template makes of one shows what it writes around the texts."""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from mmtrain.records.chat import Conversation, Image, Message, Part, Role, Text, ToolCall
from mmtrain.records.reasoning import CLOSE, split_reasoning


class Marks(NamedTuple):
    """What is around the reasoning at the beginning of a text: `<think>` and `</think>`, with white space."""

    opening: str
    close: str


Content = str | Marks
"""A part of a turn: `text`, `image`, or a text that begins with reasoning, which the template writes in its own way."""


class TurnForm(NamedTuple):
    """What the template's own text depends on in a turn."""

    role: Role
    kinds: tuple[Content, ...]
    """Of each part, after `reasoning` if the turn has some of its own."""
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None

    @property
    def marks(self) -> Marks | None:
        """Those of the reasoning in its text."""
        return next((kind for kind in self.kinds if isinstance(kind, Marks)), None)

    @property
    def is_reasoned(self) -> bool:
        return self.marks is not None or "reasoning" in self.kinds

    @property
    def num_texts(self) -> int:
        """The number of its stand-ins."""
        return len(self.kinds) - self.kinds.count("image") + sum(isinstance(kind, Marks) for kind in self.kinds)


class Form(NamedTuple):
    """What the template's own text depends on."""

    turns: tuple[TurnForm, ...]
    tools: tuple[str, ...] = ()


STAND_IN = re.compile(r"Zq(\d+)qZ")


def stand_in(number: int) -> str:
    """What stands for the text with this number."""
    return f"Zq{number}qZ"


def reasoned_text(marks: Marks, reasoning: int, reply: int) -> str:
    """The stand-ins of a reply that begins with reasoning."""
    return f"{marks.opening}{stand_in(reasoning)}{marks.close}{stand_in(reply)}"


def turn_form(message: Message, splits_reasoning: bool) -> TurnForm:
    """`splits_reasoning`: reasoning at the beginning of a reply has a stand-in of its own."""
    kinds: list[Content] = ["image" if isinstance(part, Image) else "text" for part in message.parts]
    first = message.parts[0] if message.role == "assistant" and message.parts else None
    if splits_reasoning and isinstance(first, Text) and CLOSE in first.text:
        found = split_reasoning(first.text)
        kinds[0] = "text" if found is None else Marks(found.opening, found.close)
    own = ("reasoning", *kinds) if message.reasoning else tuple(kinds)
    return TurnForm(message.role, own, message.calls, message.name, message.call_id)


def texts_of(conversation: Conversation, form: Form) -> list[str]:
    """The texts of the conversation by the number of their stand-in."""
    found: list[str] = []
    for message, turn in zip(conversation.messages, form.turns, strict=True):
        if message.reasoning:
            found.append(message.reasoning)
        for part, kind in zip(message.parts, turn.kinds[1:] if message.reasoning else turn.kinds, strict=True):
            if isinstance(part, Text):
                reasoned = split_reasoning(part.text) if isinstance(kind, Marks) else None
                found += (part.text,) if reasoned is None else (reasoned.reasoning, reasoned.reply)
    return found


def numbered(form: Form) -> Iterator[tuple[int, bool]]:
    """The turn of each stand-in, and whether it is for reasoning."""
    for number, turn in enumerate(form.turns):
        for kind in turn.kinds:
            if isinstance(kind, Marks) or kind == "reasoning":
                yield number, True
            if kind not in ("image", "reasoning"):
                yield number, False


def stand_ins(form: Form) -> Conversation:
    """A conversation of this form with stand-ins for its texts."""
    numbers = itertools.count()
    messages: list[Message] = []
    for role, kinds, calls, name, call_id in form.turns:
        reasoning = stand_in(next(numbers)) if "reasoning" in kinds else ""
        parts: list[Part] = []
        for kind in kinds:
            if kind == "image":
                parts.append(Image(""))
            elif isinstance(kind, Marks):
                parts.append(Text(reasoned_text(kind, next(numbers), next(numbers))))
            elif kind == "text":
                parts.append(Text(stand_in(next(numbers))))
        messages.append(Message(role, tuple(parts), reasoning=reasoning, calls=calls, name=name, call_id=call_id))
    return Conversation(tuple(messages), tools=form.tools)
