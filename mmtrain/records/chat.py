"""A conversation as plain data: what every record format becomes, and all that the encoder sees."""

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Messages = list[dict[str, Any]]
"""Turns as chat templates take them."""


class SampleError(Exception):
    """Why one sample cannot be used. Whoever knows the file and the line adds them."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture as the record names it: a path, or the bytes of a data URI."""

    name: str
    data: bytes | None = None


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    train: bool = True
    """False where the record says that this turn is not learned."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Image))
