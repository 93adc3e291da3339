"""Conversations as messages for a chat template, in the form that the template takes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mmtrain.records.chat import Conversation, Image, Message, Messages, SampleError

Tools = list[dict[str, Any]]
"""Functions in the form of OpenAI, as chat templates take them."""

ArgumentForm = Literal["object", "text"]
REASONING = "reasoning_content"
"""The key of the reasoning of a reply in general."""


class Render(Protocol):
    """From messages, whether a reply is to follow, and the functions that can be called, to text."""

    def __call__(self, messages: Messages, begun: bool, tools: Tools | None = None, /) -> str: ...


def as_messages(messages: Sequence[Message]) -> Messages:
    """Turns as chat templates take them in general: content in parts, arguments of calls as JSON text."""
    return [_as_message(message) for message in messages]


def as_tools(conversation: Conversation) -> Tools | None:
    """The functions of a conversation as chat templates take them."""
    return [json.loads(tool) for tool in conversation.tools] or None


def _as_message(message: Message) -> dict[str, Any]:
    content = [
        {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text} for part in message.parts
    ]
    found: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        found[REASONING] = message.reasoning
    if message.calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.calls
        ]
    if message.name is not None:
        found["name"] = message.name
    if message.call_id is not None:
        found["tool_call_id"] = message.call_id
    return found


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How a template takes messages."""

    text_roles: frozenset[str]
    """The roles whose content the template takes as a string: a list of parts is dropped there, or printed as data."""
    arguments: ArgumentForm | None = None
    """How the template takes the arguments of calls; None where it does not show calls."""
    reasoning_key: str | None = None
    """The key under which the template takes the reasoning of a reply; None where it shows none."""

    def apply(self, messages: Messages) -> Messages:
        """`messages`, as `as_messages` gives them, in this form. Raises SampleError where the template has no place for
        what they have."""
        return [self._of_turn(message) for message in messages]

    def _of_turn(self, message: dict[str, Any]) -> dict[str, Any]:
        takes_text = message["role"] in self.text_roles
        if not takes_text and "tool_calls" not in message and REASONING not in message:
            return message
        found = dict(message)
        if takes_text:
            found["content"] = "".join([part.get("text", "") for part in message["content"]])
        if "tool_calls" in message:
            found["tool_calls"] = [self._of_call(call) for call in message["tool_calls"]]
        if REASONING in message:
            if self.reasoning_key is None:
                raise SampleError(
                    "the model's chat template does not show the reasoning of a reply: name the key in "
                    "data.ignore_fields to train without it"
                )
            found[self.reasoning_key] = found.pop(REASONING)
        return found

    def _of_call(self, call: dict[str, Any]) -> dict[str, Any]:
        if self.arguments is None:
            raise SampleError("the model's chat template does not show the calls of tools")
        if self.arguments == "text":
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
