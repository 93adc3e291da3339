"""Shards in WebDataset layout: members of a tar that share a key are one sample.

`KEY.json` is the record. Where it names no image, the other members of the key that are images are its images, in the
order of the shard; an image that it names is taken from the shard if it is there. `KEY.txt` in its place is the
record's `text`, as shards of images and captions have it, and next to it says nothing else. Nothing is unpacked.
"""

import itertools
from array import array
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.data_files import READ
from mmtrain.records.json_text import MAX_RECORD, parse_json
from mmtrain.records.sources.place import Place
from mmtrain.records.tar_index import tar_index
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import shown, visible

_IMAGES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"])
_MAX_IMAGE = 256 * 2**20


class TarFile:
    """The samples of a shard. The places of its members are found once, when it is opened."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError if it is not a plain, whole tar file."""
        self.path = path
        self._index = tar_index(path)
        groups = [(key, len(list(members))) for key, members in itertools.groupby(map(_key, self._index.names()))]
        again = [key for key, number in Counter(key for key, _ in groups).items() if number > 1]
        if again:
            raise UserError(
                f"{visible(str(path))}: the members of the key {shown(again[0])} are not next to each other: make the "
                "shard again with its names in order, such as with tar --sort=name"
            )
        self._bounds = array("Q", itertools.accumulate((number for _, number in groups), initial=0))
        """Where the samples begin among the members, and where the last one ends."""

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=_key(self._index.name(self._bounds[index])))

    def record(self, index: int) -> Any:
        """The record of a sample, with the bytes of its images. Raises SampleError with the reason if there is none."""
        try:
            with open_regular(self.path) as file:
                members = [self._member(number, file) for number in range(*self._bounds[index : index + 2])]
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from None
        content = dict(members)
        if len(content) < len(members):
            raise SampleError(f"two members have the same name: {shown(members[-1][0])}")
        record = _parsed(content)
        if isinstance(record, list):  # of messages
            record = {"messages": record}
        return _with_images(record, content) if isinstance(record, dict) else record

    def _member(self, number: int, file: BinaryIO) -> tuple[str, bytes]:
        name = self._index.name(number)
        return name, self._index.content(number, file, MAX_RECORD if _suffix(name) == ".json" else _MAX_IMAGE)


def _parsed(content: dict[str, bytes]) -> Any:
    """The record of a key, removed from `content`."""
    records = [name for name in content if _suffix(name) == ".json"]
    texts = [name for name in content if _suffix(name) == ".txt"]
    if len(records) > 1 or (not records and len(texts) != 1):
        names = ", ".join(shown(name, 40) for name in list(content)[:4])
        is_table = any(name.lower().endswith(READ) and _suffix(name) not in (".json", ".tar") for name in content)
        hint = "; take the table out of the shard, and set `root` of the source to the shard" if is_table else ""
        raise SampleError(f"expected one .json member of the key, or one .txt, found {names}{hint}")
    record = parse_json(content.pop(records[0])) if records else {}
    if not texts or not isinstance(record, dict):
        return record
    try:
        text = content.pop(texts[0]).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise SampleError(f"the member {shown(texts[0])} is not UTF-8") from None
    if isinstance(caption := record.get("caption", record.get("text")), str) and caption.strip() == text:
        return record
    if "text" in record:
        raise SampleError(f"the member {shown(texts[0])} is another text than that of the record: leave it out")
    return record | {"text": text}


def _suffix(name: str) -> str:
    """`.json` of `a/b.json` and of `a/b.input.json`."""
    return PurePosixPath(name).suffix.lower()


def _with_images(record: dict[str, Any], content: dict[str, bytes]) -> dict[str, Any]:
    """`record` with the images of its key, which are all that `content` has. Raises SampleError for another member."""
    if others := [name for name in content if _suffix(name) not in _IMAGES]:
        raise SampleError(f"the member {shown(others[0])} is neither the record nor an image")
    named = next((key for key in ("images", "image") if record.get(key) not in (None, "", [])), None)
    if named is None:
        images = [{"bytes": found, "path": name} for name, found in content.items()]
        return record | {"images": images} if images else record
    by_name = {PurePosixPath(name).name: (name, found) for name, found in content.items()}
    given = record[named] if isinstance(record[named], list) else [record[named]]
    made = []
    for value in given:
        name, found = by_name.pop(PurePosixPath(value).name if isinstance(value, str) else "", ("", b""))
        made.append({"bytes": found, "path": name} if name else value)
    if by_name:
        raise SampleError(f"the record does not name the member {shown(next(iter(by_name)))} of its key")
    return record | {named: made}


def _key(name: str) -> str:
    """The name up to the first dot of its last component, as WebDataset has it."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
