"""The shapes of records that people have: how each is recognised, and the turns that it becomes.

A shape is a row of `SHAPES` and one function from a record to its turns: objects with `role`, `content` and what else
the record says of the turn. The first row whose keys a record has is its shape.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtrain.records.chat import SampleError
from mmtrain.records.json_text import parsed_value
from mmtrain.records.record_keys import Record, fields_text, ignored_text
from mmtrain.records.unknown_shapes import choices_of, how_to_read, renamed_turn
from mmtrain.safe_text import shown

Turns = Callable[[Record], list[Record]]


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    needs: tuple[str, ...]
    """The keys that every record of it has."""
    turns: Turns
    also: tuple[str, ...] = ()
    """Other keys that it understands, besides the images and the system text."""
    has_marks: bool = True
    """Whether marks in the text stand for images; otherwise only the parts of a turn are images."""


_SPEAKERS = {"system": "system", "user": "user", "human": "user", "input": "user"} | dict.fromkeys(
    ("assistant", "gpt", "output"), "assistant"
)
"""Keys of an object that has the texts of one or two speakers in place of `role` and `content`."""


def _list_of_turns(key: str) -> Turns:
    """`role` and `content`, or `from` and `value` as in LLaVA and ShareGPT, or the texts of two speakers: `user` and
    `assistant` as in the_cauldron, `human` and `assistant` as in ms-swift, `input` and `output` as in XTuner."""
    return lambda record: [
        found for n, turn in enumerate(_objects(record.get(key), key), 1) for found in _turns_of(turn, n)
    ]


def _turns_of(turn: Record, number: int) -> list[Record]:
    named = renamed_turn(turn)
    if "role" in named:
        return [named]
    said = {key: role for key, role in _SPEAKERS.items() if turn.get(key) is not None}
    if not said or len(set(said.values())) < len(said):
        keys = ", ".join(shown(key, 20) for key in list(turn)[:4]) or "no keys"
        raise SampleError(f"turn {number} has {keys}, expected 'role' and 'content', or 'from' and 'value'")
    more = {key: value for key, value in turn.items() if key not in said}
    asked: Record = {key: more.pop(key) for key in ("image", "images") if key in more}
    last = list(said)[-1]
    return [
        {"role": role, "content": turn[key], **(asked if role == "user" else {}), **(more if key == last else {})}
        for key, role in said.items()
    ]


def _gemini(record: Record) -> list[Record]:
    """`contents` with `parts`, and the system text under `systemInstruction`."""
    system = record.get("systemInstruction") or record.get("system_instruction")
    first = [{"role": "system", "parts": system.get("parts") if isinstance(system, dict) else system}] if system else []
    turns = []
    for turn in [*first, *_objects(record["contents"], "contents")]:
        parts = turn.get("parts")
        content = [_gemini_part(part) for part in parts] if isinstance(parts, list) else parts
        turns.append({**{key: value for key, value in turn.items() if key != "parts"}, "content": content})
    return turns


def _gemini_part(part: Any) -> Any:
    if not isinstance(part, dict) or len(part) != 1:
        return part
    ((key, value),) = part.items()
    if key == "text":
        return {"type": "text", "text": value}
    if key in ("functionCall", "function_call") and isinstance(value, dict):
        return {"type": "tool_call", "value": {("arguments" if k == "args" else k): v for k, v in value.items()}}
    if key in ("functionResponse", "function_response") and isinstance(value, dict):
        return {"type": "tool_result", **{("content" if k == "response" else k): v for k, v in value.items()}}
    if key in ("inlineData", "inline_data") and isinstance(value, dict):
        return {"type": "image", "image": {"data": value.get("data")}}
    if key in ("fileData", "file_data") and isinstance(value, dict):
        return {"type": "image", "image": value.get("fileUri") or value.get("file_uri")}
    return part


def _alpaca(reply: str) -> Turns:
    """The instruction, then the input on a new line."""

    def turns(record: Record) -> list[Record]:
        instruction, more = record["instruction"], record.get("input")
        prompt = f"{instruction}\n{more}" if isinstance(instruction, str) and isinstance(more, str) and more else None
        if prompt is None and more not in (None, ""):
            raise SampleError(f"'input' must be text next to an instruction, not {shown(more)}")
        asked = _asked(instruction if prompt is None else prompt)
        return [*_history(record), asked, _said(_one_text(record[reply], reply))]

    return turns


def _one_reply(prompt: str, reply: str) -> Turns:
    def turns(record: Record) -> list[Record]:
        if choices := choices_of(record):
            how, left = how_to_read(record, _KEYS), ignored_text([choices])
            raise SampleError(f"{shown(choices)}: if they are not in the question, {how}; if they are, set {left}")
        return [*_history(record), _asked(_one_text(record[prompt], prompt)), _said(_one_text(record[reply], reply))]

    return turns


def _prompt_and_completion(record: Record) -> list[Record]:
    """Texts, turns or lists of turns as in TRL: those of the prompt are not trained on."""
    prompt, reply = (
        [one] if isinstance(one, dict) and "role" in renamed_turn(one) else one
        for one in (record["prompt"], record["completion"])
    )
    before = [_asked(prompt)] if not isinstance(prompt, list) else _objects(prompt, "prompt")
    after = [_said(reply)] if not isinstance(reply, list) else _objects(reply, "completion")
    return [*_history(record), *({**renamed_turn(turn), "train": False} for turn in before), *map(renamed_turn, after)]


def _history(record: Record) -> list[Record]:
    turns: list[Record] = []
    for pair in as_list(record.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise SampleError(f"'history' must be a list of [question, reply], not of {shown(pair)}")
        turns += [_asked(pair[0]), _said(pair[1])]
    return turns


def _one_text(value: Any, key: str) -> Any:
    """A reply. Raises SampleError for several texts, which are other answers to the same question, for a number, which
    may stand for a class, and for an object."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        raise SampleError(
            f"{shown(key)} has {len(value)} texts: for the first, set {fields_text({key: f'{key}.0'})} of the source"
        )
    if isinstance(value, int | dict) and not isinstance(value, bool):
        meant = "its JSON text" if isinstance(value, dict) else "the number"
        raise SampleError(
            f"{shown(key)} must be text, not {shown(value)}: if {meant} is meant, set "
            f"{fields_text({key: f'{{{key}}}'})} of the source"
        )
    return value


def _asked(content: Any) -> Record:
    return {"role": "user", "content": content}


def _said(content: Any) -> Record:
    return {"role": "assistant", "content": content}


def as_list(value: Any, key: str) -> list[Any]:
    """`value`, a list or the JSON text of one, as tables have it. Raises SampleError if it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed_value(value, key)
    if not isinstance(value, list):
        raise SampleError(f"{shown(key)} must be a list, not {shown(value)}")
    return value


def _objects(value: Any, key: str) -> list[Record]:
    """A list of objects, also as an object of lists of the same length: so `datasets` stores some."""
    if isinstance(value, dict):
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    turns = as_list(value, key)
    if others := [turn for turn in turns if not isinstance(turn, dict)]:
        raise SampleError(f"{shown(key)} must be a list of turns, each an object, not {shown(others[0])}")
    return turns


_HISTORY = ("history",)
SHAPES = (
    Shape("conversations", ("conversations",), _list_of_turns("conversations")),
    Shape("messages", ("messages", "images"), _list_of_turns("messages")),
    Shape("messages", ("messages", "image"), _list_of_turns("messages")),
    Shape("openai", ("messages",), _list_of_turns("messages"), has_marks=False),
    Shape("conversation", ("conversation",), _list_of_turns("conversation")),
    Shape("texts", ("texts",), _list_of_turns("texts")),
    Shape("gemini", ("contents",), _gemini, ("systemInstruction", "system_instruction"), has_marks=False),
    Shape("alpaca", ("instruction", "output"), _alpaca("output"), ("input", *_HISTORY)),
    Shape("alpaca", ("instruction", "response"), _alpaca("response"), ("input", *_HISTORY)),
    Shape("query", ("query", "response"), _one_reply("query", "response"), _HISTORY),
    Shape("question", ("question", "answer"), _one_reply("question", "answer"), _HISTORY),
    Shape("prompt", ("prompt", "completion"), _prompt_and_completion, _HISTORY),
    Shape("prompt", ("prompt", "response"), _one_reply("prompt", "response"), _HISTORY),
    Shape("prefix", ("prefix", "suffix"), _one_reply("prefix", "suffix")),
    Shape("input", ("input", "output"), _one_reply("input", "output"), _HISTORY),
    Shape("caption", ("prompt", "caption"), _one_reply("prompt", "caption")),
    Shape("caption", ("prompt", "text"), _one_reply("prompt", "text")),
)
_NEEDED = frozenset(key for shape in SHAPES for key in shape.needs)
_KEYS = [(shape.needs, shape.also) for shape in SHAPES]
SHAPE_NAMES = tuple(dict.fromkeys(shape.name for shape in SHAPES))


@functools.lru_cache(maxsize=1024)
def _shape_with(keys: tuple[str, ...]) -> Shape | None:
    return next((shape for shape in SHAPES if set(keys).issuperset(shape.needs)), None)


def recognise(record: Record) -> Shape:
    """The shape of a record, by its keys; a key with null is as one that is not there. Raises SampleError."""
    shape = _shape_with(tuple([key for key in record if key in _NEEDED and record[key] is not None]))
    if shape is not None and record.get("chosen") is None:  # which reply is meant has to be said
        return shape
    given = {key: value for key, value in record.items() if value is not None}
    keys = ", ".join(shown(key, 20) for key in list(given)[:6])
    remedy = how_to_read(given, _KEYS)
    raise SampleError(f"no known format: found {keys or 'no keys with a value'}; {remedy}")


def named_shape(record: Record, name: str) -> Shape:
    """The shape `name`, in the variant whose keys the record has. Raises SampleError."""
    variants = [shape for shape in SHAPES if shape.name == name]
    for shape in variants:
        if all(record.get(key) is not None for key in shape.needs):
            return shape
    if name == "messages" and record.get("messages") is not None:
        return variants[0]  # a record of the source that has no image
    keys = " or ".join(" and ".join(map(shown, shape.needs)) for shape in variants)
    raise SampleError(f"`format: {name}` needs the keys {keys}")
