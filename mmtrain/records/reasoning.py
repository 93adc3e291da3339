"""Reasoning before a reply, between `<think>` and `</think>` in its text."""

from dataclasses import replace
from typing import NamedTuple

from mmtrain.records.chat import Conversation, Message, Part, SampleError, Text
from mmtrain.safe_text import shown

OPEN, CLOSE = "<think>", "</think>"


class Reasoned(NamedTuple):
    """The text of a turn in four: `<think>`, the reasoning, `</think>` and the reply. White space around the reasoning
    belongs to the marks."""

    opening: str
    reasoning: str
    close: str
    reply: str


def split_reasoning(text: str) -> Reasoned | None:
    """None where the text does not begin with reasoning. `<think>` may be missing: some prompts end with it."""
    before, close, after = text.partition(CLOSE)
    head, is_open, inside = before.rpartition(OPEN)
    if not close or CLOSE in after or head.strip():
        return None
    reasoning, reply = inside.strip(), after.lstrip()
    opening = head + is_open + inside[: len(inside) - len(inside.lstrip())]
    close = before[len(opening) + len(reasoning) :] + CLOSE + after[: len(after) - len(reply)]
    return Reasoned(opening, reasoning, close, reply)


def reply_of(text: str) -> str:
    """The text without the reasoning at its beginning."""
    found = split_reasoning(text)
    return text if found is None else found.reply


def without_reasoning(conversation: Conversation) -> Conversation:
    """The conversation without the reasoning of its replies. Raises SampleError where it is not clear what that is."""
    return replace(conversation, messages=tuple(map(_without, conversation.messages)))


def _without(message: Message) -> Message:
    message = replace(message, reasoning="")
    if message.role != "assistant" or CLOSE not in message.text:
        return message
    return replace(message, parts=tuple(map(_reply, message.parts)))


def _reply(part: Part) -> Part:
    if not isinstance(part, Text) or CLOSE not in part.text:
        return part
    found = split_reasoning(part.text)
    if found is None:
        raise SampleError(
            f"labels.reasoning is drop, and it is not clear where the reasoning of {shown(part.text, 40)} ends: "
            f"expected one {OPEN}...{CLOSE} at the beginning of the reply"
        )
    return Text(found.reply)
