"""What to do about a record of no known shape: its keys say which columns to map, or what it is."""

from collections.abc import Iterable, Sequence
from typing import Any

from mmtrain.records.record_keys import Record, is_image, why_refused
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
    **dict.fromkeys(("problem", "user", "human", "request", "text_input"), ""),
}
"""Keys of what the user asks, each with that of the reply in a known shape, if there is one."""
_REPLIES = (
    *("answer", "response", "completion", "output", "outputs", "solution", "assistant", "gpt", "reply", "target"),
    *("caption", "text", "label", "ground_truth", "description", "captions", "answers", "text_output"),
)
_SCRIPT = "docs/data.md has a script for COCO and VQA"


def renamed_turn(turn: Record) -> Record:
    named = dict(turn)
    for old, new in _TURN_NAMES:
        if old in named and new not in named:
            named[new] = named.pop(old)
    if isinstance(role := named.get("role"), str):
        named["role"] = role.lower().strip("<|>")
    return named


def how_to_read(keys: Record, shapes: Iterable[Sequence[str]]) -> str:
    """For a record with these keys, those with null left out. `shapes`: the keys of each known shape."""
    if reason := why_refused(keys):
        return reason
    if "annotations" in keys and isinstance(keys.get("data"), dict):
        return "an export of Label Studio as JSON: export it as JSON-MIN, which has a key for each answer"
    if keys and all(isinstance(value, dict) for value in keys.values()):
        return "if its values are the records, write them to a file, one on each line"
    has_image = "image" in keys or "images" in keys or any(map(is_image, keys.values()))
    url = next((key for key, value in keys.items() if key.lower().endswith("url") and isinstance(value, str)), None)
    if url is not None and not has_image:
        return f"{shown(url)} is the address of an image: nothing is fetched, download the images first"
    objects = {key: value for key, value in keys.items() if _is_objects(value)}
    for key, value in objects.items():
        if "role" in renamed_turn(value[0]) and key != "prompt":
            return f"its turns are read with `fields` of the source: {{conversations: {shown(key)}}}"
    return (
        _mapped(keys, shapes)
        or _in_a_file(objects)
        or (
            "expected 'messages', 'conversations', a question and its answer or the like: see docs/data.md, or map the "
            "columns with `fields` of the source"
        )
    )


def _mapped(keys: Record, shapes: Iterable[Sequence[str]]) -> str | None:
    """The columns to map, None where it is not clear which is the reply."""
    plain = {key.strip().lower(): key for key in keys}
    for needs in shapes:
        if all(key in plain for key in needs):
            return _fields({key: shown(plain[key]) for key in needs if plain[key] != key}, keys)
    asked = next((key for key in _REPLY_OF if key in plain), None)
    reply = next((key for key in _REPLIES if key in plain), None)
    if reply is None:
        return None
    own, value = plain[reply], keys[plain[reply]]
    if asked is None:
        more = "" if own in ("caption", "text") else f", and {_fields({'caption': _from(own, value)}, keys)}"
        what = "a text without a question: set `prompt` of the source to what the user asks, such as"
        return f'{what} "Describe the image."{more}'
    is_known = bool(_REPLY_OF[asked]) and plain[asked] == asked
    fields = {} if is_known else {"question": shown(plain[asked])}
    if (target := _REPLY_OF[asked] if is_known else "answer") != own:
        fields[target] = _from(own, value)
    left = f", and {shown(own)} in data.ignore_fields" if isinstance(value, list) else ""
    return _fields(fields, keys) + left


def _fields(fields: dict[str, str], keys: Record) -> str:
    image = next((key for key, value in keys.items() if is_image(value)), None)
    if image is not None and not ("image" in keys or "images" in keys):
        fields = {"image": shown(image), **fields}
    return f"they are read with `fields` of the source: {{{', '.join(f'{key}: {own}' for key, own in fields.items())}}}"


def _from(key: str, value: Any) -> str:
    """What `fields` writes for a reply: the first of several, and a number as text."""
    if isinstance(value, list) and value:
        return f"{key}.0.{key.removesuffix('s')}" if isinstance(value[0], dict) else f"{key}.0"
    return f'"{{{key}}}"' if isinstance(value, int) else shown(key)


def _in_a_file(objects: Record) -> str | None:
    """`objects`: the keys with lists of objects."""
    lists = [key for key in objects if key not in ("images", "categories", "licenses")]
    return f"if {shown(lists[0])} are the records, write them to a file: {_SCRIPT}" if lists else None


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
