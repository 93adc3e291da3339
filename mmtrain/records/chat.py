"""A conversation as plain data: every record format is read into it, and the encoder sees nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmtrain.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
Messages = list[dict[str, Any]]
"""Turns in the form that chat templates take."""


class SampleError(Exception):
    """The reason why a sample cannot be used. The caller adds the file and the line."""


@contextmanager
def refused_at(place: object) -> Iterator[None]:
    """Turn a SampleError inside into a UserError that begins with `place`."""
    try:
        yield
    except SampleError as error:
        raise UserError(f"{place}: {error}") from None


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the record gives it: a path, or its bytes with a name for messages."""

    name: str
    data: bytes | None = None


Part = Text | Image


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant calls."""

    name: str
    arguments: str
    """A JSON object."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    train: bool = True
    """False if the record says not to train on this turn."""
    weight: float = 1.0
    """What each of its tokens counts in the loss, if it is trained on."""
    reasoning: str = ""
    """What the assistant thinks before it replies."""
    calls: tuple[ToolCall, ...] = ()
    """What the assistant calls after its text."""
    name: str | None = None
    """Of a turn of a tool: the function that was called, if the record says."""
    call_id: str | None = None
    """Of a turn of a tool: the call that it answers, if the record says."""

    @property
    def text(self) -> str:
        if len(self.parts) == 1 and isinstance(part := self.parts[0], Text):
            return part.text
        return "".join([part.text for part in self.parts if isinstance(part, Text)])


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    shape: str = field(default="", compare=False)
    """The shape of record that it was read from."""
    has_unmarked_images: bool = field(default=False, compare=False)
    """Whether the record says nothing about where its images are, so that they were put first."""
    tools: tuple[str, ...] = ()
    """The functions that the assistant can call, each as JSON in the form of OpenAI."""

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple([part for message in self.messages for part in message.parts if isinstance(part, Image)])

    def up_to(self, turn: int) -> "Conversation":
        """The conversation up to `turn`, which alone is trained on."""
        earlier = (replace(message, train=message.role != "assistant") for message in self.messages[:turn])
        return replace(self, messages=(*earlier, self.messages[turn]))
