"""The keys of a record: each is understood, plainly metadata, empty, ignored by name in the config, or refused.

Metadata are the names in `METADATA` and all that end in `_id`. They say where a record comes from, not how to train on
it. Any other unused key could matter (a loss flag, boxes, tools, a second image), so it is refused.
"""

import re
from collections.abc import Iterable, Set
from typing import Any, NamedTuple

from mmtrain.config.yaml_file import yaml_text
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown

Record = dict[str, Any]

_NAMES = """
id _id idx index uid uuid guid key hash md5 sha256 title
source sources data_source dataset dataset_name data_name subset split origin file filename file_name url link
license licence copyright author annotator version model model_name generator meta metadata
timestamp time date datetime created created_at create_time updated_at update_time
category categories subcategory task task_type task_name type domain topic topics tag tags keyword keywords
schemaVersion language lang difficulty width height width_list height_list cache_control parallel_tool_calls lead_time
"""
METADATA = frozenset([*_NAMES.split(), "__index_level_0__", "Unnamed: 0", ""])
"""The last three are the numbers of rows that pandas writes."""
_PREFERENCES = "preference pairs are not trained on, only one reply"
_REASONS = {
    "mask": "it means opposite things in different tools: give the turn 'train': true or false instead",
    "objects": "its names and boxes are not put into the texts: write them there",
    **dict.fromkeys(
        ("video", "videos", "audio", "audios"), "only text and images are trained on: give frames as images"
    ),
    **dict.fromkeys(("chosen", "preferred_output", "rejected", "non_preferred_output"), _PREFERENCES),
    **dict.fromkeys(("rejected_response", "rejected_messages", "kto_tag"), _PREFERENCES),
}
"""Why some keys are refused that mean something in other tools."""
_MAX_SHOWN = 1000
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
IMAGE_KEYS = frozenset(
    (
        "path",
        "url",
        "detail",
        "bytes",
        "data",
        "type",
        "media_type",
        "format",
        "source",
        "s3Location",
        "uri",
        "bucketOwner",
    )
)
"""Keys of an image that is given as an object. `detail` is OpenAI's hint for its own service."""
_OBJECTS_OF_IMAGES = ("image", "image_url")
_IDS_OF_MEDIA = ("image_id", "img_id", "video_id")
_SUFFIX = r"\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac)"
_IMAGE = re.compile(r"(?!\w+://).*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm)$", re.IGNORECASE)
_MEDIA = re.compile(rf"data:(image|video|audio)/|.*{_SUFFIX}$", re.IGNORECASE)


def without_keys(record: Record, ignored: Set[str], depth: int = 2) -> Record:
    """A copy of `record` without the keys `ignored`, in the record, its turns and the parts of their content, which are
    objects in lists `depth` times inside it, and in objects that are images."""
    return {key: _without(key, value, ignored, depth) for key, value in record.items() if key not in ignored}


def _without(key: str, value: Any, ignored: Set[str], depth: int) -> Any:
    if key in _OBJECTS_OF_IMAGES and isinstance(value, dict):
        return without_keys(value, ignored, 0)
    if not depth or not isinstance(value, list):
        return value
    return [without_keys(item, ignored, depth - 1) if isinstance(item, dict) else item for item in value]


def check_keys(record: Record, understood: Set[str], turns: Iterable[Record], of_turn: Set[str]) -> None:
    """Raises SampleError naming every key of the record, its turns and their parts that would silently be lost."""
    lost = unknown_keys(record, understood)
    for number, turn in enumerate(turns, start=1):
        lost += unknown_keys(turn, of_turn, f" of turn {number}")
        for content in turn.values():
            for part in content if isinstance(content, list) else ():
                known = _PART_KEYS.get(str(part.get("type"))) if isinstance(part, dict) else None
                if known is not None:
                    lost += unknown_keys(part, known, f" of a part of turn {number}")
    refuse_keys(lost)


class UnknownKey(NamedTuple):
    key: str
    value: Any
    where: str = ""
    """Where it is in the record, such as ` of turn 1`."""


def refuse_keys(lost: list[UnknownKey]) -> None:
    """Raises SampleError if `lost` is not empty."""
    if not lost:
        return
    names = ", ".join(shown(one.key, 40) + one.where for one in lost[:4])
    names += f" and {len(lost) - 4} more" if len(lost) > 4 else ""
    hint = ""
    if any(_is_media(one.value) for one in lost):
        hint = "only text, and images under 'image' or 'images', are read: "
    if images := [one.key for one in lost if is_image(one.value) and not one.where]:
        hint = f"if images are there, set {fields_text(image_fields(images))} of the source. Otherwise "
    keys = ["kto_tag" if isinstance(one.value, bool) and one.key == "label" else one.key for one in lost]
    if reason := why_refused(keys):
        hint = f"{reason}. Otherwise "
    what, them = ("the key", "it") if len(lost) == 1 else ("the keys", "them")
    raise SampleError(
        f"{what} {names} {'is' if len(lost) == 1 else 'are'} not understood: {hint}remove {them}, or to train without "
        f"{them} set {ignored_text(one.key for one in lost)}"
    )


def fields_text(fields: dict[str, str]) -> str:
    """`fields` of a source as a config has it, where it is not too long to show."""
    listed = ", ".join(f"{key}: {yaml_text(column)}" for key, column in fields.items())
    return f"`fields: {{{listed}}}`" if len(listed) < _MAX_SHOWN else "`fields`"


def ignored_text(keys: Iterable[str]) -> str:
    """The keys to ignore as a config has them, where they are not too many to show."""
    listed = ", ".join(map(yaml_text, dict.fromkeys(keys)))
    return f"`data.ignore_fields: [{listed}]`" if len(listed) < _MAX_SHOWN else "`data.ignore_fields`"


def image_fields(columns: list[str]) -> dict[str, str]:
    """What `fields` of a source has for these columns of images."""
    return {f"image_{n}": name for n, name in enumerate(columns, 1)} if columns[1:] else {"image": columns[0]}


def why_refused(keys: Iterable[str]) -> str | None:
    """Why one of these keys is refused, where other tools have a meaning for it."""
    return next((_REASONS[key] for key in keys if key in _REASONS), None)


def unknown_keys(found: Record, understood: Set[str], where: str = "") -> list[UnknownKey]:
    """The keys of `found` that are neither understood nor metadata nor empty."""
    if found.keys() <= understood:
        return []
    unknown = found.keys() - understood - METADATA
    return [
        UnknownKey(str(key), value, where)  # the keys of a map in a table can be numbers
        for key, value in found.items()
        if key in unknown and not str(key).endswith("_id") and not (value is None or value in ("", [], {}))
    ]


def check_no_image_is_lost(record: Record, understood: Set[str]) -> None:
    """For a record without images. Raises SampleError if its metadata name an image, video or sound."""
    for key, value in record.items():
        if key not in understood and (_is_media(value) or (key in _IDS_OF_MEDIA and value not in (None, ""))):
            raise SampleError(
                f"{shown(key, 40)} is {shown(value)}, but the record has no image: give images under 'image' or "
                f"'images', such as with {fields_text({'image': f'images/{{{key}}}.jpg'})} of the source, or set "
                f"{ignored_text([key])}"
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
