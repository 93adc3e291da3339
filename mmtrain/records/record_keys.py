"""The keys of a record: each is understood, plainly metadata, empty, ignored by name in the config, or refused.

Metadata are the names in `METADATA` and all that end in `_id`. They say where a record comes from, not how to train on
it. Any other unused key could matter (a loss flag, boxes, tools, a second image), so it is refused.
"""

import re
from collections.abc import Iterable, Set
from typing import Any

from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown

Record = dict[str, Any]

_NAMES = """
id _id idx index uid uuid guid key hash md5 sha256 title
source sources data_source dataset dataset_name data_name subset split origin file filename file_name url link
license licence copyright author annotator version model model_name generator meta metadata
timestamp time date datetime created created_at create_time updated_at update_time
category categories subcategory task task_type task_name type domain topic topics tag tags keyword keywords
language lang difficulty width height width_list height_list cache_control parallel_tool_calls lead_time
"""
METADATA = frozenset([*_NAMES.split(), "__index_level_0__", "Unnamed: 0", ""])
"""The last three are the numbers of rows that pandas writes."""
_PREFERENCES = (
    "preference pairs are not trained on: to train on the preferred reply, map it with `fields` of the source"
)
_REASONS = {
    "mask": "it means opposite things in different tools: give the turn 'train': true or false instead",
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "preferred_output"), _PREFERENCES),
}
"""Why some keys are refused that mean something in other tools."""
_TEXT_KEYS = frozenset({"type", "text", "value"})
_OF_IMAGE = frozenset({"type", "path", "url", "value", "index", "detail", "base64"})
_PART_KEYS = {
    "text": _TEXT_KEYS,
    "input_text": _TEXT_KEYS,
    "output_text": _TEXT_KEYS,
    "tool_call": _TEXT_KEYS,
    "image": _OF_IMAGE | {"image"},
    "image_url": _OF_IMAGE | {"image_url"},
    "input_image": _OF_IMAGE | {"image_url"},
}
IMAGE_KEYS = frozenset({"path", "url", "detail", "bytes", "data", "type", "media_type"})
"""Keys of an image that is given as an object. `detail` is OpenAI's hint for its own service."""
_IDS_OF_MEDIA = ("image_id", "img_id", "video_id")
_SUFFIX = r"\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac)"
_IMAGE = re.compile(r"(?!\w+://).*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm)$", re.IGNORECASE)
_MEDIA = re.compile(rf"data:(image|video|audio)/|.*{_SUFFIX}$", re.IGNORECASE)


def without_keys(record: Record, ignored: Set[str], depth: int = 2) -> Record:
    """A copy of `record` without the keys `ignored`, in the record, its turns and the parts of their content, which are
    objects in lists `depth` times inside it."""
    return {key: _without(value, ignored, depth) for key, value in record.items() if key not in ignored}


def _without(value: Any, ignored: Set[str], depth: int) -> Any:
    if not depth or not isinstance(value, list):
        return value
    return [without_keys(item, ignored, depth - 1) if isinstance(item, dict) else item for item in value]


def check_keys(record: Record, understood: Set[str], turns: Iterable[Record], of_turn: Set[str]) -> None:
    """Raises SampleError naming every key of the record, its turns and their parts that would silently be lost."""
    lost = [(shown(key, 40), value) for key, value in _unknown(record, understood)]
    for number, turn in enumerate(turns, start=1):
        lost += [(f"{shown(key, 40)} of turn {number}", value) for key, value in _unknown(turn, of_turn)]
        for content in turn.values():
            for part in content if isinstance(content, list) else ():
                known = _PART_KEYS.get(str(part.get("type"))) if isinstance(part, dict) else None
                if known is not None:
                    lost += [(f"{shown(k, 40)} of a part of turn {number}", v) for k, v in _unknown(part, known)]
    refuse_keys(lost)


def refuse_keys(lost: list[tuple[str, Any]]) -> None:
    """Raises SampleError if `lost`, a list of (name, value), is not empty."""
    if not lost:
        return
    names = ", ".join(name for name, _ in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    hint = "only text, and images under 'image' or 'images', are read: " if any(_is_media(v) for _, v in lost) else ""
    if image := next((name for name, value in lost if is_image(value) and " of " not in name), None):
        hint = f"if {image} is the image, set `fields` of the source: {{image: {image}}}. Otherwise "
    if reason := why_refused(name.partition(" of ")[0].strip("'") for name, _ in lost):
        hint = f"{reason}. Otherwise "
    what, them = ("the key", "it") if len(lost) == 1 else ("the keys", "them")
    raise SampleError(
        f"{what} {names} {'is' if len(lost) == 1 else 'are'} not understood: {hint}remove {them}, or name {them} in "
        f"data.ignore_fields to train without {them}"
    )


def why_refused(keys: Iterable[str]) -> str | None:
    """Why one of these keys is refused, where other tools have a meaning for it."""
    return next((_REASONS[key] for key in keys if key in _REASONS), None)


def unknown_keys(found: Record, understood: Set[str]) -> list[tuple[str, Any]]:
    """The keys of `found`, quoted, with their values, that are neither understood nor metadata nor empty."""
    return [(shown(key, 40), value) for key, value in _unknown(found, understood)]


def _unknown(found: Record, understood: Set[str]) -> list[tuple[str, Any]]:
    unknown = found.keys() - understood - METADATA
    if not unknown:
        return []
    return [
        (key, value)
        for key, value in found.items()
        if key in unknown and not key.endswith("_id") and not (value is None or value in ("", [], {}))
    ]


def check_no_image_is_lost(record: Record, understood: Set[str]) -> None:
    """For a record without images. Raises SampleError if its metadata name an image, video or sound."""
    for key, value in record.items():
        if key not in understood and (_is_media(value) or (key in _IDS_OF_MEDIA and value not in (None, ""))):
            raise SampleError(
                f"{shown(key, 40)} is {shown(value)}, but the record has no image: give images under 'image' or "
                f"'images', or name the key in data.ignore_fields"
            )


def is_image(value: Any) -> bool:
    """Whether a value is the path of an image, or has its bytes."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and _IMAGE.match(value[-200:]) is not None


def _is_media(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_media(item) for item in value)
    return isinstance(value, str) and _MEDIA.match(value[-200:] if len(value) > 200 else value) is not None
