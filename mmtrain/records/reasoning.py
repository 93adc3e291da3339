"""Reasoning before a reply, between `<think>` and `</think>` in its text."""

from dataclasses import replace

from mmtrain.records.chat import Conversation, Message, Part, SampleError, Text
from mmtrain.safe_text import shown

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str) -> tuple[str, str] | None:
    """The reasoning and the reply in the text of a turn, None where it does not begin with reasoning.

    `<think>` may be missing: with some models it is the end of the prompt.
    """
    before, close, reply = text.partition(CLOSE)
    head, is_open, reasoning = before.rpartition(OPEN)
    if not close or CLOSE in reply or head.strip():
        return None
    return (reasoning if is_open else before), reply


def without_reasoning(conversation: Conversation) -> Conversation:
    """The conversation without the reasoning of its replies. Raises SampleError where it is not clear what that is."""
    return replace(conversation, messages=tuple(map(_without, conversation.messages)))


def _without(message: Message) -> Message:
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
    return Text(found[1].lstrip())
