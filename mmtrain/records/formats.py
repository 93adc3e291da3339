"""The common record formats, each read into a `Conversation`.

`openai`         {"messages": [{"role", "content": text, or parts of type text / image_url / image}]}
`messages`       the same with `<image>` marks in the text and an `images` list next to `messages`
`conversations`  LLaVA and ShareGPT: {"conversations": [{"from", "value"}], "image": path or list}

A mark is `<image>`. One newline between it and the text next to it belongs to the mark, not to the text.
A turn's `train`, `trainable`, `loss` or `weight` (true, false, 1, 0) says whether an assistant turn is trained on.
"""

import base64
import re
from collections.abc import Set
from typing import Any
from urllib.parse import unquote, urlsplit

from mmtrain.records.chat import Conversation, Image, Message, Part, Role, SampleError, Text
from mmtrain.records.record_keys import (
    IMAGE_KEYS,
    Record,
    check_keys,
    check_no_image_is_lost,
    refuse_keys,
    unknown_keys,
    without_keys,
)
from mmtrain.safe_text import shown

MAX_TEXT = 4_000_000
"""Characters of text in one record: about a million tokens, for which a tokenizer takes about a GB of memory."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_MARK = re.compile(r"<image>")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_KEYS = {
    "openai": ("messages", "role", "content"),
    "messages": ("messages", "role", "content"),
    "conversations": ("conversations", "from", "value"),
}
"""For each format the keys of the turns, of a turn's role and of its content."""
_TRAIN_KEYS = ("train", "trainable", "loss", "weight")


def read_record(record: Any, record_format: str, ignored: Set[str] = frozenset()) -> Conversation:
    """The conversation in one parsed record.

    `ignored`: keys of records, turns and content parts to ignore. Raises SampleError with the reason if the record is
    not a conversation, or has a key that is neither understood nor metadata.
    """
    if not isinstance(record, dict):
        raise SampleError(f"expected an object, not {shown(record)}")
    if ignored:
        record = without_keys(record, ignored)
    if record_format == "auto":
        record_format = _recognise(record)
    turns_key, role_key, text_key = _KEYS[record_format]
    turns = _turns(record, turns_key)
    understood = {turns_key, "image", "images", "system"}
    check_keys(record, understood, turns, {role_key, text_key, *_TRAIN_KEYS})
    images = _ImageList(record)
    if record_format == "openai" and images.num:
        raise SampleError("there are images next to messages without marks: set `format: messages` to read them")
    messages = [_message(turn, role_key, text_key, None if record_format == "openai" else images) for turn in turns]
    if images.num_marks != images.num:
        raise SampleError(f"{_count(images.num_marks, '<image> mark')} but {_count(images.num, 'image')}")
    if record.get("system") is not None:
        messages.insert(0, Message("system", (Text(_text(record["system"], "system")),)))
    if not messages:
        raise SampleError("there are no turns")
    conversation = Conversation(tuple(messages))
    if not conversation.images:
        check_no_image_is_lost(record, understood)
    if (length := sum(len(message.text) for message in messages)) > MAX_TEXT:
        raise SampleError(f"{length:,} characters of text, over the {MAX_TEXT:,} allowed in a record: split it")
    return conversation


def _recognise(record: Record) -> str:
    if "conversations" in record:
        return "conversations"
    if "messages" in record:
        return "messages" if "images" in record or "image" in record else "openai"
    keys = ", ".join(shown(key, 20) for key in list(record)[:6])
    raise SampleError(f"no known format: expected the key 'messages' or 'conversations', found {keys or 'no keys'}")


class _ImageList:
    """The images of a record. The n-th belongs to the n-th mark or image part without a path."""

    def __init__(self, record: Record) -> None:
        self._images = [_image(value) for value in _image_values(record)]
        self.num = len(self._images)
        self.num_marks = 0

    def next(self, index: Any = None) -> Image:
        """`index`: the index in the list that the part gives, if it does."""
        if index is not None and index != self.num_marks:
            raise SampleError(f"an image part has the index {shown(index)}, expected {self.num_marks} by its position")
        self.num_marks += 1
        return self._images[self.num_marks - 1] if self.num_marks <= self.num else Image("")


def _message(turn: Record, role_key: str, text_key: str, images: _ImageList | None) -> Message:
    """One turn. Without `images` an `<image>` mark is text."""
    name, content = turn.get(role_key), turn.get(text_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(f"unknown role {shown(name)}: expected one of {', '.join(_ROLES)}")
    found: list[Part] = []
    for piece in content if isinstance(content, list) else [_text(content, text_key)]:
        if not isinstance(piece, str):
            found.append(_part(piece, images))
        elif images is None:
            found.append(Text(_text(piece, text_key)))
        else:
            marked = _split_marks(_text(piece, text_key))
            found += [images.next() if text is None else Text(text) for text in marked]
    parts = tuple(part for part in found if not isinstance(part, Text) or part.text)
    if role != "user" and any(isinstance(part, Image) for part in parts):
        raise SampleError(f"an image in a turn of the {role}: only the user's turns can have images")
    if role == "assistant" and not any(isinstance(part, Text) and part.text.strip() for part in parts):
        raise SampleError("an assistant turn without text")
    return Message(role, parts, _is_trained(turn, role))


def _is_trained(turn: Record, role: Role) -> bool:
    given = {key: turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise SampleError(f"{shown(key)} must be true, false, 1 or 0, not {shown(value)}")
        if value and role != "assistant":
            raise SampleError(f"{shown(key)} is on in a turn of the {role}: only the assistant's turns are trained on")
    if any(given.values()) and not all(given.values()):
        raise SampleError(f"{' and '.join(map(shown, given))} of a turn contradict each other")
    return all(given.values())


def _split_marks(text: str) -> list[str | None]:
    """The texts between the marks, and None for each mark. Empty texts are left out."""
    if "<image>" not in text:
        return [text]
    pieces: list[str | None] = []
    texts = _MARK.split(text)
    for i, piece in enumerate(texts):
        if i > 0:
            pieces.append(None)
            piece = piece.removeprefix("\n")
        if i < len(texts) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            pieces.append(piece)
    return pieces


def _part(part: Any, images: _ImageList | None) -> Part:
    """One entry of a content list. An image part without a path takes the next of `images`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(_text(_only(part, ("text", "value")), "text"))
    if kind in ("image", "image_url"):
        value = _only(part, (kind, "path", "url", "value"))
        if value is None and images is not None:
            return images.next(part.get("index"))
        return _image(value)
    raise SampleError(f"a part of type {shown(kind)}: expected 'text', 'image_url' or 'image'")


def _only(part: Record, keys: tuple[str, ...]) -> Any:
    """The value of the only key of `keys` that is given, None if there is none."""
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise SampleError(f"a part has both {shown(given[0])} and {shown(given[1])}: keep one")
    return part[given[0]] if given else None


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
        refuse_keys(unknown_keys(value, IMAGE_KEYS))
        value = _only(value, ("url", "path"))
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


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{shown(key)} must be text, not {shown(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise SampleError("text with half of a surrogate pair: it is not valid Unicode")
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
