"""What to write in the config to read a record of no known shape: which of its columns is asked, and which the reply.

What is proposed is tried on the record, so that it names all other columns that have to be ignored.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.config.data_section import LETTER, LETTERS
from mmtrain.config.yaml_file import yaml_text
from mmtrain.records.chat import SampleError
from mmtrain.records.fields import map_fields
from mmtrain.records.record_keys import (
    METADATA,
    Record,
    fields_text,
    ignored_text,
    image_fields,
    is_image,
    unknown_keys,
    why_refused,
)
from mmtrain.safe_text import shown

_TURN_NAMES = (
    *(("from", "role"), ("speaker", "role"), ("author", "role"), ("Role", "role")),
    *(("value", "content"), ("text", "content"), ("Content", "content")),
)
_REPLY_OF = {
    "question": "answer",
    "query": "response",
    "prompt": "completion",
    "instruction": "output",
    "input": "output",
}
"""Keys of what the user asks, each with that of the reply in a known shape."""
_ASKED = (
    *_REPLY_OF,
    *("problem", "user", "human", "request", "text_input", "input_text", "messages", "conversations"),
)
_REPLIES = (
    *("answer", "response", "completion", "output", "outputs", "chosen", "preferred_output", "solution", "assistant"),
    *("gpt", "reply", "target", "caption", "text", "label", "ground_truth", "description", "captions", "answers"),
    *("text_output", "output_text", "content"),
)
_CHOICES = ("choices", "options")
_CHOSEN = (
    *("answer", "label", "correct_choice_idx", "answer_index", "answer_idx", "correct_answer", "correct"),
    *("response", "completion", "output"),
)
_READ_TOO = frozenset({"image", "images", "system", "system_prompt", "tools", "functions"})
_MAX_DEPTH = 4
Keys = tuple[tuple[str, ...], tuple[str, ...]]
"""The keys that a known shape needs, and the others that it understands."""
_SCRIPT = "docs/data.md has a script for COCO and VQA"
_PROMPT = '`prompt` of the source to what the user asks, such as "Describe the image."'
_GENERAL = (
    "expected 'messages', 'conversations', a question and its answer or the like: see docs/data.md, or map the columns "
    "with `fields` of the source"
)


def renamed_turn(turn: Record) -> Record:
    named = dict(turn)
    for old, new in _TURN_NAMES:
        if old in named and new not in named:
            named[new] = named.pop(old)
    if isinstance(role := named.get("role"), str):
        named["role"] = role.lower().strip("<|>")
    return named


@dataclass(frozen=True, slots=True)
class _Proposal:
    """What the source would say."""

    fields: dict[str, str]
    needs_prompt: bool = False
    reason: str = ""


def how_to_read(record: Record, shapes: Sequence[Keys]) -> str:
    """For a record with these keys, those with null left out."""
    if "annotations" in record and isinstance(record.get("data"), dict):
        return "an export of Label Studio as JSON: export it as JSON-MIN, which has a key for each answer"
    record = {key: value for key, value in record.items() if value not in ("", [], {})}
    columns = dict(_columns(record))
    proposal = _turns(columns)
    if proposal is None:
        if elsewhere := _by_id(record) or _fetched(record):
            return elsewhere
        proposal = _known(record, shapes) or _mapped(record, columns)
        if proposal is None and (elsewhere := _in_a_file(record)):
            return elsewhere
        proposal = proposal or _two_columns(record)
    if proposal is not None and (found := _written(record, proposal, shapes)):
        return f"{why}: {found}" if (why := why_refused(record)) else found
    return why_refused(record) or _GENERAL


def choices_of(record: Record) -> str | None:
    """The column with the choices of a question."""
    return next((key for key in _CHOICES if isinstance(record.get(key), str) or _is_texts(record.get(key))), None)


def _columns(record: Record, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The columns of a record by their names in `fields`, those in objects after those next to them."""
    yield from ((f"{before}{key}", value) for key, value in record.items())
    for key, value in record.items() if depth < _MAX_DEPTH else ():
        if isinstance(value, dict) and not is_image(value):
            yield from _columns(value, f"{before}{key}.", depth + 1)


def _turns(columns: Record) -> _Proposal | None:
    """A column with a whole conversation."""
    for name, value in columns.items():
        if _are_turns(value) and len(value) > 1 and renamed_turn(value[-1]).get("role") not in ("user", "human"):
            return _Proposal({"conversations": name})
    return None


def _known(record: Record, shapes: Sequence[Keys]) -> _Proposal | None:
    """The keys of a known shape, written in another way."""
    plain = {key.strip().lower(): key for key in record}
    for needs, _ in shapes:
        if all(key in plain for key in needs) and any(key not in record for key in needs):
            return _Proposal({key: plain[key] for key in needs})
    return None


def _mapped(record: Record, columns: Record) -> _Proposal | None:
    """Columns with names for what is asked and the reply; None where it is not clear which is the reply."""
    asked, chosen, choices = _called(_ASKED, record, columns), _called(_CHOSEN, record, columns), choices_of(record)
    if asked and chosen and choices:
        spec = f":{LETTERS}" if isinstance(record[choices], list) else ""
        answer = f"{{{chosen}:{LETTER}}}" if spec and str(columns[chosen]).isdecimal() else chosen
        return _Proposal({"question": f"{{{asked}}}\n{{{choices}{spec}}}", "answer": answer})
    reply = _called([name for name in _REPLIES if name != asked], record, columns)
    if reply is None:
        return None
    if asked is None:
        if not _images(record) and _two_columns(record):
            return None
        target = reply if reply in ("caption", "text") else "caption"
        return _Proposal({target: _from(reply, columns[reply])}, True, "a text without a question: ")
    if _are_turns(columns[asked]):
        return _Proposal({"prompt": asked, "completion": reply})
    keys = (asked, _REPLY_OF[asked]) if asked in _REPLY_OF else ("question", "answer")
    return _Proposal({keys[0]: asked, keys[1]: _from(reply, columns[reply])})


def _called(names: Iterable[str], record: Record, columns: Record) -> str | None:
    """The column of the record with the first of these names, or the first one in its objects that has any of them."""
    texts = [column for column, value in columns.items() if isinstance(value, str | int | list) or _are_turns([value])]
    own = {column.strip().lower(): column for column in texts if column in record}
    first = next((own[name] for name in names if name in own), None)
    inside = (column for column in texts if column not in record and column.rpartition(".")[2].lower() in names)
    return first or next(inside, None)


def _two_columns(record: Record) -> _Proposal | None:
    """Where a record has besides images and metadata only two texts, or an image and one: in any language."""
    own = {key: value for key, value in record.items() if key not in METADATA and not key.endswith("_id")}
    texts = [key for key, value in own.items() if isinstance(value, str) and not is_image(value)]
    if _images(record):
        texts = [key for key in texts if not own[key].strip().isdecimal()]
    if len(texts) == 2:
        asked, reply = texts
        reason = f"if {shown(asked, 20)} is what the user asks and {shown(reply, 20)} the reply, "
        return _Proposal({"question": asked, "answer": reply}, reason=reason)
    if len(texts) == 1 and _images(record) and texts[0].lower() not in _ASKED:
        return _Proposal({"caption": texts[0]}, True, f"if {shown(texts[0], 20)} is the reply, ")
    return None


def _written(record: Record, proposal: _Proposal, shapes: Sequence[Keys]) -> str | None:
    """What to write, None where the record would not be read so."""
    fields = {key: column for key, column in proposal.fields.items() if key != column}
    if "image" not in record and "images" not in record and (images := _images(record)):
        fields = image_fields(images) | fields
    try:
        made = map_fields(record, fields) | ({"prompt": "?"} if proposal.needs_prompt else {})
    except (SampleError, ValueError):  # names of columns with braces are no templates
        return None
    shape = next((keys for keys in shapes if all(made.get(key) is not None for key in keys[0])), None)
    if shape is None:
        return None
    left = [one.key for one in unknown_keys(made, {*shape[0], *shape[1], *_READ_TOO, *fields})]
    said = [_PROMPT] if proposal.needs_prompt else []
    said += [f"{fields_text(fields)} of the source"] if fields else []
    said += [ignored_text(left)] if left else []
    return f"{proposal.reason}set {', and '.join(said)}" if said else None


def _images(record: Record) -> list[str]:
    """The columns that are images."""
    return [key for key, value in record.items() if is_image(value)]


def _from(column: str, value: Any) -> str:
    """What `fields` writes for a reply: the first of several, and a number or an object as text."""
    if _are_turns(value) or not isinstance(value, int | list):
        return column
    if _is_texts(value):
        return f"{column}.0"
    first = value[0] if isinstance(value, list) and _is_objects(value) else {}
    own = (name for name in (column.rpartition(".")[2].removesuffix("s"), "value", "text") if name in first)
    return next((f"{column}.0.{name}" for name in own), f"{{{column}}}")


def _by_id(record: Record) -> str | None:
    """For an object whose values are the records, or say where records are."""
    values = list(record.values())
    if not values or not all(isinstance(value, dict) and value for value in values):
        return None
    if isinstance(path := values[0].get("annotation"), str):
        root = f", root: {yaml_text(values[0]['root'])}" if isinstance(values[0].get("root"), str) else ""
        return f"a list of sources: name them in data.train, the first as {{path: {yaml_text(path)}{root}}}"
    if len(values) > 1 and set.intersection(*map(set, values)):
        return "if its values are the records, " + _write("list(json.load(open('FILE')).values())")
    return None


def _fetched(record: Record) -> str | None:
    texts = {key: value for key, value in record.items() if isinstance(value, str) and key.lower().endswith("url")}
    urls = (key for key, value in texts.items() if value.startswith("http"))
    if _images(record) or "image" in record or "images" in record or (url := next(urls, None)) is None:
        return None
    return f"{shown(url)} is the address of an image: nothing is fetched, download the images first"


def _in_a_file(record: Record) -> str | None:
    lists = [key for key, value in record.items() if _is_objects(value) and not _are_turns(value)]
    lists = [key for key in lists if key not in ("images", "categories", "licenses")]
    if not lists:
        return None
    if "images" in record or "questions" in record:
        return f"if {shown(lists[0])} are the records, write them to a file: {_SCRIPT}"
    return f"if {shown(lists[0])} are the records, " + _write(f"json.load(open('FILE'))[{lists[0]!r}]")


def _write(records: str) -> str:
    """The command that writes what a Python expression gives."""
    return f"""write them to a file: python -c "import json; json.dump({records}, open('records.json', 'w'))\""""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _are_turns(value: Any) -> bool:
    return _is_objects(value) and "role" in renamed_turn(value[0])
