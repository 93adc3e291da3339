"""Shards in WebDataset layout: members of a tar that share a key are one sample.

`KEY.json` is the record. Where it names no image, the other members of the key that are images are its images, in the
order of the shard; an image that it names is taken from the shard if it is there. `KEY.txt` in its place is the
record's `text`, as shards of images and captions have it. Nothing is unpacked.
"""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.json_text import MAX_RECORD, parse_json, too_long
from mmtrain.records.sources.place import Place
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, shown, visible

_IMAGES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"])
_MAX_IMAGE = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """`.json` of `a/b.json` and of `a/b.input.json`."""
        return PurePosixPath(self.name).suffix.lower()


class TarFile:
    """The samples of a shard. Where every member lies is found once, when it is opened."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and UserError if it is not a plain, whole tar file."""
        self.path = path
        self._samples: list[tuple[str, list[_Member]]] = []
        with open_regular(path) as file:
            for member in _members(path, file):
                key = _key(member.name)
                if not self._samples or self._samples[-1][0] != key:
                    self._samples.append((key, []))
                self._samples[-1][1].append(member)

    def __len__(self) -> int:
        return len(self._samples)

    def place(self, index: int) -> Place:
        return Place(self.path, index + 1, key=self._samples[index][0])

    def record(self, index: int) -> Any:
        """The record of a sample, with the bytes of its images. Raises SampleError with the reason if there is none."""
        _, members = self._samples[index]
        try:
            with open_regular(self.path) as file:
                content = {member.name: _content(member, file.fileno()) for member in members}
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from None
        record = _parsed(members, content)
        return _with_images(record, content) if isinstance(record, dict) else record


def _parsed(members: Sequence[_Member], content: dict[str, bytes]) -> Any:
    """The record of a key, removed from `content`."""
    records = [member for member in members if member.suffix == ".json"]
    texts = [member for member in members if member.suffix == ".txt"]
    if not records and len(texts) == 1:
        try:
            return {"text": content.pop(texts[0].name).decode("utf-8").strip()}
        except UnicodeDecodeError:
            raise SampleError(f"the member {shown(texts[0].name)} is not UTF-8") from None
    if len(records) != 1:
        raise SampleError(f"{len(records)} .json members of the key, expected one: {_names(members)}")
    return parse_json(content.pop(records[0].name))


def _with_images(record: dict[str, Any], content: dict[str, bytes]) -> dict[str, Any]:
    """`record` with the images of its key, which are all that `content` has. Raises SampleError for another member."""
    if others := [name for name in content if PurePosixPath(name).suffix.lower() not in _IMAGES]:
        raise SampleError(f"the member {shown(others[0])} is neither the record nor an image")
    named = next((key for key in ("images", "image") if record.get(key) not in (None, "", [])), None)
    if named is None:
        return (
            record | {"images": [{"bytes": found, "path": name} for name, found in content.items()]}
            if content
            else record
        )
    by_name = {PurePosixPath(name).name: (name, found) for name, found in content.items()}
    given = record[named] if isinstance(record[named], list) else [record[named]]
    made = []
    for value in given:
        name, found = by_name.pop(PurePosixPath(value).name if isinstance(value, str) else "", ("", b""))
        made.append({"bytes": found, "path": name} if name else value)
    if by_name:
        raise SampleError(f"the record does not name the member {shown(next(iter(by_name)))} of its key")
    return record | {named: made}


def _members(path: Path, file: Any) -> list[_Member]:
    where, size = visible(str(path)), os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found = [_Member(one.name, one.offset_data, one.size) for one in tar if _is_file(where, one)]
            end = tar.offset
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{where}: not a plain tar file: {one_line(error)}") from None
    if os.pread(file.fileno(), 512, end).strip(b"\0") or end > size:
        last = f" after the member {shown(found[-1].name)}" if found else ""
        raise UserError(f"{where}: the tar file is broken{last}: make it again")
    return found


def _is_file(where: str, member: tarfile.TarInfo) -> bool:
    if member.isdir() or PurePosixPath(member.name).name.startswith("."):
        return False
    if not member.isreg() or member.issparse():
        raise UserError(f"{where}: the member {shown(member.name)} is not a plain file: leave it out")
    return True


def _key(name: str) -> str:
    """The name up to the first dot of its last component, as WebDataset has it."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _content(member: _Member, descriptor: int) -> bytes:
    most = MAX_RECORD if member.suffix == ".json" else _MAX_IMAGE
    if member.size > most:
        raise too_long(member.size, "bytes")
    found = os.pread(descriptor, member.size, member.offset)
    if len(found) < member.size:
        raise SampleError(f"the member {shown(member.name)} is cut off: {len(found):,} of {member.size:,} bytes")
    return found


def _names(members: Sequence[_Member]) -> str:
    return ", ".join(shown(member.name, 40) for member in members[:4])
