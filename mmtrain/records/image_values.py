"""An image as a record gives it: a path, an address of a file, base64, or its bytes."""

import base64
import binascii
import itertools
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from mmtrain.records.chat import Image, SampleError
from mmtrain.records.record_keys import IMAGE_KEYS, Record, refuse_keys, unknown_keys
from mmtrain.safe_text import shown

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")
"""The other alphabet of base64, without characters that have a meaning in an address."""
_MIN_BASE64 = 48
"""Characters from which on a text can be an image in base64: no image is smaller."""
_BASE64_OF_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0AK|UD[1-6])[A-Za-z0-9+/_\s-]*={0,2}\s*")
"""The beginning of JPEG, PNG, GIF, WebP, BMP, TIFF and PPM in base64. A path has a dot, which base64 lacks."""


def as_image(value: Any) -> Image:
    """The image that `value` gives. Raises SampleError with the reason if it is none, or not on this machine."""
    if isinstance(value, dict):
        return _from_object(value)
    if isinstance(value, bytes) and value:
        return Image("bytes", value)
    if not isinstance(value, str) or not value:
        raise SampleError(f"an image must be a path, a file:// address, base64 or a data URI, not {shown(value)}")
    if value.startswith("data:"):
        match = _DATA_URI.match(value)
        if match is None:
            raise SampleError(f"expected data:image/…;base64,…, not {shown(value, 40)}")
        return Image("data URI", _decoded(value[match.end() :], "a data URI"))
    if len(value) >= _MIN_BASE64 and _BASE64_OF_IMAGE.fullmatch(value):
        return Image("base64", _decoded(value, "an image"))
    return Image(_local_path(value))


def with_numbered_images(record: Record) -> Record:
    """`record` with the images of its columns `image_1`, `image_2` and so on as `images`, if it has no other."""
    if "image_1" not in record or record.get("image") or record.get("images"):
        return record
    names = list(itertools.takewhile(record.__contains__, (f"image_{number}" for number in itertools.count(1))))
    given = [record[name] for name in names if record[name] is not None]
    if given != [record[name] for name in names[: len(given)]]:
        raise SampleError(f"{shown(names[0])} to {shown(names[-1])} have a gap: give the images without one")
    return {key: value for key, value in record.items() if key not in names} | {"images": given}


def _from_object(value: dict[str, Any]) -> Image:
    """`bytes` and `path` as in Hugging Face data sets, `url` as in OpenAI's, `data` as in Anthropic's and Gemini's."""
    refuse_keys(unknown_keys(value, IMAGE_KEYS))
    for key in ("source", "s3Location"):  # of Bedrock
        if isinstance(inside := value.get(key), dict):
            return as_image(inside)
    data = {key: value[key] for key in ("bytes", "data") if value.get(key) is not None}
    if not data:
        return as_image(only(value, ("url", "uri", "path")))
    if len(data) > 1 or value.get("url") is not None:
        raise SampleError("an image has bytes and something else too: keep one")
    ((key, content),) = data.items()
    name = value.get("path")
    if isinstance(content, str):
        content = _decoded(content, f"{shown(key)} of an image")
    if not isinstance(content, bytes):
        raise SampleError(f"{shown(key)} of an image must be bytes or base64, not {shown(content)}")
    return Image(name if isinstance(name, str) and name else "bytes", content)


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()).translate(_URL_SAFE), validate=True)
    except (ValueError, binascii.Error):
        raise SampleError(f"{what} that is not base64") from None


def _local_path(value: str) -> str:
    try:
        address = urlsplit(value) if "://" in value else None
    except ValueError:
        raise SampleError(f"the image {shown(value)} is not an address") from None
    if address is None:
        return value
    if address.scheme == "file" and address.netloc in ("", "localhost"):
        return unquote(address.path)
    raise SampleError(f"the image {shown(value)} is not a local file: nothing is fetched, download it first")


def only(part: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the only key of `keys` that is given, None if there is none. Raises SampleError if two are."""
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise SampleError(f"a part has both {shown(given[0])} and {shown(given[1])}: keep one")
    return part[given[0]] if given else None
