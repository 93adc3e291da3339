"""The record shapes people have, each read into a `Conversation`.

`openai`         {"messages": [{"role", "content": text, or parts of type text / image_url / image}]}
`messages`       the same with `<image>` marks in the text and an `images` list beside `messages`
`conversations`  LLaVA and ShareGPT: {"conversations": [{"from", "value"}], "image": path or list}

A mark is `<image>`; one newline that parts it from the words around it belongs to the mark, not to the words.
"""

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from mmtrain.data.chat import Conversation, Image, Message, Part, Role, SampleError, Text
from mmtrain.foreign_text import shown

Record = dict[str, Any]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_MARK = re.compile(r"<image>")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_NOT_SUPPORTED = ("video", "videos", "audio", "audios", "tools")


def read_record(record: Any, record_format: str) -> Conversation:
    """The conversation in one parsed record. Raises SampleError with the reason where it is not one."""
    if not isinstance(record, dict):
        raise SampleError(f"expected an object, not {shown(record)}")
    for key in _NOT_SUPPORTED:
        if record.get(key):
            raise SampleError(f"{shown(key)} is not supported: only text and pictures are")
    if record_format == "auto":
        record_format = _recognise(record)
    if record_format == "openai" and _image_values(record):
        raise SampleError("images beside messages without marks: format 'messages' reads them")
    messages = tuple(_READERS[record_format](record))
    if record.get("system") is not None:
        messages = (Message("system", (Text(_text(record["system"], "system")),)), *messages)
    if not messages:
        raise SampleError("there are no turns")
    return Conversation(messages)


def _recognise(record: Record) -> str:
    if "conversations" in record:
        return "conversations"
    if "messages" in record:
        return "messages" if "images" in record or "image" in record else "openai"
    keys = ", ".join(shown(key, 20) for key in list(record)[:6])
    raise SampleError(f"no known format: expected the key 'messages' or 'conversations', found {keys or 'no keys'}")


def _read_openai(record: Record) -> Iterator[Message]:
    for turn in _turns(record, "messages"):
        content = turn.get("content")
        parts: tuple[Part, ...]
        if isinstance(content, list):
            parts = tuple(_part(part, None) for part in content)
        else:
            parts = (Text(_text(content, "content")),)
        yield _message(turn, "role", parts)


def _read_messages(record: Record) -> Iterator[Message]:
    return _read_marked(record, "messages", "role", "content")


def _read_conversations(record: Record) -> Iterator[Message]:
    return _read_marked(record, "conversations", "from", "value")


_READERS: dict[str, Callable[[Record], Iterator[Message]]] = {
    "openai": _read_openai,
    "messages": _read_messages,
    "conversations": _read_conversations,
}


def _read_marked(record: Record, turns_key: str, role_key: str, text_key: str) -> Iterator[Message]:
    """Turns with `<image>` marks, the n-th of which stands for the n-th of the record's pictures."""
    images = [_image(value) for value in _image_values(record)]
    left = iter(images)
    num_marks = 0
    messages = []
    for turn in _turns(record, turns_key):
        content = turn.get(text_key)
        parts: list[Part] = []
        for piece in content if isinstance(content, list) else [_text(content, text_key)]:
            if isinstance(piece, str):
                marked = _split_marks(_text(piece, text_key))
                num_marks += sum(mark is None for mark in marked)
                parts += [next(left, _NO_IMAGE) if text is None else Text(text) for text in marked]
            else:
                part = _part(piece, left)
                num_marks += isinstance(part, Image)
                parts.append(part)
        messages.append(_message(turn, role_key, tuple(parts)))
    if num_marks != len(images):
        raise SampleError(f"{_count(num_marks, '<image> mark')} but {_count(len(images), 'image')}")
    yield from messages


_NO_IMAGE = Image("")


def _split_marks(text: str) -> list[str | None]:
    """The words between the marks, None for each mark; empty words are left out."""
    if "<image>" not in text:
        return [text]
    pieces: list[str | None] = []
    words = _MARK.split(text)
    for i, piece in enumerate(words):
        if i > 0:
            pieces.append(None)
            piece = piece.removeprefix("\n")
        if i < len(words) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            pieces.append(piece)
    return pieces


def _part(part: Any, images: Iterator[Image] | None) -> Part:
    """One entry of a content list; an image part without a path of its own takes the next of `images`."""
    if isinstance(part, str):
        return Text(_text(part, "text"))
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(_text(part.get("text", part.get("value")), "text"))
    if kind in ("image", "image_url"):
        value = next((part[key] for key in (kind, "path", "url", "value") if part.get(key) is not None), None)
        if value is not None:
            return _image(value)
        return next(images, _NO_IMAGE) if images is not None else _image(value)
    raise SampleError(f"a part of type {shown(kind)}: expected 'text', 'image_url' or 'image'")


def _image_values(record: Record) -> list[Any]:
    values = [record[key] for key in ("images", "image") if record.get(key) is not None]
    if len(values) > 1:
        raise SampleError("both 'images' and 'image' are given: keep one")
    if not values:
        return []
    value = values[0]
    return value if isinstance(value, list) else [value]


def _image(value: Any) -> Image:
    if isinstance(value, dict):
        value = value.get("url", value.get("path"))
    if not isinstance(value, str) or not value:
        raise SampleError(f"an image must be a path, a file:// address or a data URI, not {shown(value)}")
    if value.startswith("data:"):
        match = _DATA_URI.match(value)
        if match is None:
            raise SampleError(f"expected data:image/…;base64,…, not {shown(value, 40)}")
        try:
            return Image("data URI", base64.b64decode(value[match.end() :], validate=True))
        except ValueError:
            raise SampleError("a data URI that is not base64") from None
    try:
        address = urlsplit(value) if "://" in value else None
    except ValueError:
        raise SampleError(f"the image {shown(value)} is not an address") from None
    if address is None:
        return Image(value)
    if address.scheme == "file" and address.netloc in ("", "localhost"):
        return Image(unquote(address.path))
    raise SampleError(f"the image {shown(value)} is not a local file: nothing is fetched, download it first")


def _turns(record: Record, key: str) -> list[Record]:
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError(f"{shown(key)} must be a list of objects")
    return turns


def _message(turn: Record, role_key: str, parts: tuple[Part, ...]) -> Message:
    name = turn.get(role_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(f"unknown role {shown(name)}: expected one of {', '.join(_ROLES)}")
    if turn.get("tool_calls"):
        raise SampleError("tool calls are not supported")
    train = turn.get("train", turn.get("weight", 1) != 0)  # OpenAI's files say `weight: 0`
    if not isinstance(train, bool):
        raise SampleError(f"'train' must be true or false, not {shown(train)}")
    parts = tuple(part for part in parts if not isinstance(part, Text) or part.text)
    if role != "user" and any(isinstance(part, Image) for part in parts):
        raise SampleError(f"an image in a turn of the {role}: only the user's turns can hold pictures")
    if role == "assistant" and not any(isinstance(part, Text) and part.text.strip() for part in parts):
        raise SampleError("an assistant turn with no words")
    return Message(role, parts, train)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{shown(key)} must be text, not {shown(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise SampleError("text with half of a surrogate pair: it is not valid Unicode")
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
