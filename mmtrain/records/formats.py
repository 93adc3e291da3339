"""One record read into a `Conversation`: the turns of its shape, with its images at their marks.

A turn's `train`, `trainable`, `training` or `loss` (true, false, 1, 0) says whether an assistant turn is trained on,
its `weight`, `loss_weight` or `loss_scale` how much its tokens count in the loss.
Images that no mark and no part of a turn places come first in the first turn of the user.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

from mmtrain.records.chat import Conversation, Image, Message, Part, Role, SampleError, Text
from mmtrain.records.image_values import as_image, only, with_numbered_images
from mmtrain.records.marks import Mark, find_mark, mark_called, split_at_paths
from mmtrain.records.record_keys import (
    Record,
    UnknownKey,
    check_keys,
    check_no_image_is_lost,
    refuse_keys,
    without_keys,
)
from mmtrain.records.shapes import as_list, named_shape, recognise
from mmtrain.records.tools import (
    RECORD_KEYS,
    RESULT_KEYS,
    RESULT_ROLES,
    TURN_KEYS,
    calls_of,
    result_text,
    tools_of,
    with_calls,
)
from mmtrain.safe_text import counted, shown

MAX_TEXT = 4_000_000
"""Characters of text in one record: about a million tokens, for which a tokenizer takes about a GB of memory."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    **dict.fromkeys(RESULT_ROLES, "tool"),
}
_SWITCHES = ("train", "trainable", "training", "loss")
_WEIGHTS = ("weight", "loss_weight", "loss_scale")
_TRAIN_KEYS = (*_SWITCHES, *_WEIGHTS)
_MAX_WEIGHT = 1000
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PLAIN_KEYS = frozenset({"role", "content"})
_SYSTEM_KEYS = ("system", "system_prompt")
_IMAGE_KEYS = ("images", "image")
_RECORD_KEYS = frozenset({*_SYSTEM_KEYS, *_IMAGE_KEYS, *RECORD_KEYS})
_TURN_KEYS = frozenset({*_PLAIN_KEYS, *_TRAIN_KEYS, *_REASONING_KEYS, *TURN_KEYS, *_IMAGE_KEYS})
_WRONG_TURN = "an image in a turn of the {}: only the user's turns can have images"
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")


def read_record(
    record: Any, record_format: str = "auto", ignored: Set[str] = frozenset(), image_mark: str | None = None
) -> Conversation:
    """The conversation in one parsed record.

    `record_format`: the name of a shape, or `auto`. `ignored`: keys of records, turns and content parts to ignore.
    `image_mark`: the text that stands for an image, None: recognised. Raises SampleError with the reason if the record
    is not a conversation, or has a key that is neither understood nor metadata.
    """
    if isinstance(record, list) and record and all(isinstance(turn, dict) for turn in record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise SampleError(f"expected an object, not {shown(record)}")
    if ignored:
        record = without_keys(record, ignored)
    record = with_numbered_images(record)
    shape = recognise(record) if record_format == "auto" else named_shape(record, record_format)
    turns = shape.turns(record)
    understood = _RECORD_KEYS.union(shape.needs, shape.also)
    check_keys(record, understood, turns, _TURN_KEYS)
    turns = with_calls(turns)
    images = _ImageList(record, shape.has_marks, turns, image_mark, "</img>" not in ignored)
    messages = images.placed([_turn_message(turn, number, images) for number, turn in enumerate(turns, start=1)])
    if (system := _one_of(record, _SYSTEM_KEYS)) is not None:
        content = system if isinstance(system, list) else _text(system, "system")
        messages.insert(0, _message({"role": "system", "content": content}, 0, images))
    if not messages:
        raise SampleError("there are no turns")
    conversation = Conversation(tuple(messages), shape.name, images.are_unmarked, tools_of(record))
    if not conversation.images:
        check_no_image_is_lost(record, understood)
    if (length := _length(conversation)) > MAX_TEXT:
        raise SampleError(f"{length:,} characters of text, over the {MAX_TEXT:,} allowed in a record: split it")
    return conversation


class _ImageList:
    """The images of a record. The n-th belongs to the n-th mark or image part without a path."""

    def __init__(
        self, record: Record, has_marks: bool, turns: Sequence[Record], image_mark: str | None, reads_paths: bool
    ) -> None:
        """`record`: what lists the images, a record or one turn. `has_marks`: whether marks in its text stand for them.
        `reads_paths`: `<img>path</img>` in a text is an image. Raises SampleError where the images have no place in
        such a record."""
        self._images = [as_image(value) for value in _image_values(record)]
        self._image_mark, self._may_have_paths = image_mark, reads_paths
        self._reads_paths = reads_paths and not self._images
        if self._images and not has_marks:
            raise SampleError("there are images next to messages without marks: set `format: messages` to read them")
        self.mark: Mark | None = None
        """None where a mark is text."""
        if has_marks:
            texts = list(_texts(turns)) if self._images else []
            self.mark = mark_called(image_mark) if image_mark else find_mark(texts, len(self._images))
        self._num_marks = 0
        self._num_inline = 0

    @property
    def are_unmarked(self) -> bool:
        """Whether there are images and nothing says where they are."""
        return bool(self._images) and not self._num_marks and not self._num_inline

    def of_turn(self, turn: Record) -> "_ImageList | None":
        """The images that the turn lists itself, None where it lists none."""
        if turn.keys().isdisjoint(_IMAGE_KEYS) or not _image_values(turn):
            return None
        if self._images:
            raise SampleError("both the record and a turn list images: keep one")
        return _ImageList(turn, True, [turn], self._image_mark, self._may_have_paths)

    def next(self, index: Any = None) -> Image:
        """`index`: the index in the list that the part or the mark gives, if it does."""
        if index is not None and index != self._num_marks:
            raise SampleError(f"an image has the index {shown(index)}, expected {self._num_marks} by its position")
        self._num_marks += 1
        return self._images[self._num_marks - 1] if self._num_marks <= len(self._images) else Image("")

    def of_part(self, value: Any, index: Any) -> Image:
        """The image of a part of a turn: `value`, or the next of the list if it is None."""
        if value is None and self.mark is not None:
            return self.next(index)
        self._num_inline += 1
        return as_image(value)

    def in_text(self, text: str, role: Role) -> Iterator[Part]:
        """`text` with images in place of marks, and in a turn of the user in place of paths where none are listed."""
        has_paths = role == "user" and self._reads_paths and "<img>" in text
        for number, piece in enumerate(split_at_paths(text) if has_paths else (text,)):
            if number % 2:
                yield self.of_part(piece, None)
            elif self.mark is None:
                yield Text(piece)
            else:
                for one in self.mark.split(piece):
                    yield Text(one) if isinstance(one, str) else self.next(one - 1 if one else None)

    def placed(self, messages: list[Message]) -> list[Message]:
        """`messages`, with images without a place put first in the first turn of the user."""
        if not self.are_unmarked:
            if self._num_marks != len(self._images) and self.mark is not None:
                marks = counted(self._num_marks, f"{self.mark.text} mark")
                raise SampleError(f"{marks} but {counted(len(self._images), 'image')}")
            return messages
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise SampleError(f"{counted(len(self._images), 'image')} but no turn of the user")
        filled = replace(messages[first], parts=(*self._images, *messages[first].parts))
        return [*messages[:first], filled, *messages[first + 1 :]]


def _turn_message(turn: Record, number: int, images: _ImageList) -> Message:
    own = images.of_turn(turn)
    message = _message(turn, number, own or images)
    if own is not None and message.role != "user":
        raise SampleError(_WRONG_TURN.format(message.role))
    return message if own is None else own.placed([message])[0]


def _texts(turns: Sequence[Record]) -> list[str]:
    contents = [turn.get("content") for turn in turns]
    pieces = [piece for content in contents for piece in (content if isinstance(content, list) else [content])]
    return [piece for piece in pieces if isinstance(piece, str)]


def _message(turn: Record, number: int, images: _ImageList) -> Message:
    name, content = turn.get("role"), turn.get("content")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(f"unknown role {shown(name)}: expected one of {', '.join(_ROLES)}")
    calls = calls_of(turn)
    content = [] if calls and content is None else result_text(content) if role == "tool" else content
    found: list[Part] = []
    for piece in content if isinstance(content, list) else [_text(content, "content")]:
        if not isinstance(piece, str):
            found.append(_part(piece, images))
        else:
            found += images.in_text(_text(piece, "content"), role)
    parts = tuple([part for part in found if not isinstance(part, Text) or part.text])
    if role != "user" and any(isinstance(part, Image) for part in parts):
        raise SampleError(_WRONG_TURN.format(role))
    message = Message(role, parts)
    if role == "assistant" and not calls and not message.text.strip():
        raise SampleError("an assistant turn without text")
    if turn.keys() <= _PLAIN_KEYS:
        return message
    reasoning = _text(_one_of(turn, _REASONING_KEYS) or "", "the reasoning")
    _check_role(turn, number, role, {"calls": bool(calls), "reasoning": bool(reasoning)})
    name, call_id = (_text(turn.get(key) or "", key) or None for key in ("name", "tool_call_id"))
    weight = _weight(turn, role)
    return Message(role, parts, weight > 0, weight or 1.0, reasoning, calls, name, call_id)


def _check_role(turn: Record, number: int, role: Role, of_assistant: dict[str, bool]) -> None:
    """Raises SampleError where a turn has what only those of another role can have."""
    if role != "assistant" and (wrong := [what for what, is_given in of_assistant.items() if is_given]):
        raise SampleError(f"{wrong[0]} in a turn of the {role}: only the assistant's turns can have that")
    if role != "tool" and (wrong := [key for key in RESULT_KEYS if turn.get(key) not in (None, "", [])]):
        refuse_keys([UnknownKey(key, turn[key], f" of turn {number}") for key in wrong])


def _length(conversation: Conversation) -> int:
    """The characters of its texts, calls and tools."""
    texts = [text for message in conversation.messages for text in (message.text, message.reasoning)]
    calls = [text for one in conversation.messages for call in one.calls for text in (call.name, call.arguments)]
    return sum(map(len, [*texts, *calls, *conversation.tools]))


def _weight(turn: Record, role: Role) -> float:
    """What the turn's tokens count in the loss, 0 if it is not to be trained on."""
    if turn.keys().isdisjoint(_TRAIN_KEYS):
        return 1.0
    given = {key: turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if key in _SWITCHES and value not in (0, 1):
            raise SampleError(f"{shown(key)} must be true, false, 1 or 0, not {shown(value)}")
        if not isinstance(value, int | float) or not 0 <= value <= _MAX_WEIGHT:
            raise SampleError(f"{shown(key)} must be a number from 0 to {_MAX_WEIGHT:,}, not {shown(value)}")
        if value and role != "assistant":
            raise SampleError(f"{shown(key)} is on in a turn of the {role}: only the assistant's turns are trained on")
    weights = {float(value) for key, value in given.items() if key in _WEIGHTS}
    if len(weights) > 1 or (any(given.values()) and not all(given.values())):
        raise SampleError(f"{' and '.join(map(shown, given))} of a turn contradict each other")
    if role == "assistant" and not all(given.values()):
        return 0.0
    return weights.pop() if weights and role == "assistant" else 1.0


def _part(part: Any, images: _ImageList) -> Part:
    """One entry of a content list."""
    kind = part.get("type", _only_key(part)) if isinstance(part, dict) else None
    if kind in _TEXT_TYPES:
        return Text(_text(only(part, ("text", "value")), "text"))
    if kind in _IMAGE_TYPES:
        keys = ("image_url" if kind == "input_image" else kind, "path", "url", "value", "base64")
        source = part.get("source")  # Anthropic's; otherwise it is metadata
        return images.of_part(only(part, (*keys, "source") if isinstance(source, dict) else keys), part.get("index"))
    raise SampleError(f"a part of type {shown(kind)}: expected 'text', 'image_url' or 'image'")


def _image_values(record: Record) -> list[Any]:
    value = _one_of(record, _IMAGE_KEYS)
    if isinstance(value, str) and value.startswith("["):
        value = as_list(value, "images")
    if isinstance(value, dict) and value and all(str(key).startswith("<") for key in value):
        value = list(value.values())  # by the marks that stand for them
    given = value if isinstance(value, list) else [value]
    return [image for image in given if image not in (None, "")]


def _only_key(part: Record) -> str | None:
    """The type of a part without `type`: `{"image": path}` or `{"text": text}`, as in Qwen-VL and Bedrock."""
    return next((kind for kind in (*_TEXT_TYPES, *_IMAGE_TYPES) if part.keys() == {kind}), None)


def _one_of(record: Record, keys: Sequence[str]) -> Any:
    """The value of the only one of `keys` that is given, None where each is null or an empty text."""
    given = [key for key in keys if record.get(key) not in (None, "")]
    if len(given) > 1:
        raise SampleError(f"both {shown(given[0])} and {shown(given[1])} are given: keep one")
    return record[given[0]] if given else None


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        hint = ": write its JSON text, if that is meant" if isinstance(value, dict) else ""
        raise SampleError(f"{shown(key)} must be text, not {shown(value)}{hint}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError("text with half of a surrogate pair: it is not valid Unicode") from None
    return value
