"""Encoded samples as one safetensors file, read by memory map.

Its tensors are those of `SampleArrays`, and with f paths of images:

image_paths      bytes: each path at which an image was looked for, closed by a null
image_versions   (f, 3) int64: size and times of the file there when it was measured, or -1
image_is_used    (f,) bool: whether an encoded sample has it
faults           bytes: JSON, a list of [index, kind, reason]

The header has the notes, as JSON, and a CRC-32 of the whole file with zeros in place of its own digits. Files are
written here and not by the library, which has all tensors in memory before it writes one.
"""

import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.dataset.encoded_chunk import (
    CHUNK_ARRAYS,
    EncodedChunk,
    Fault,
    Note,
    SampleArrays,
    merge_faults,
    merge_notes,
)
from mmtrain.errors import storage_faults
from mmtrain.user_cache import Version, file_version

_TYPES = {
    "sum_weights": "F64",
    "image_versions": "I64",
    **dict.fromkeys(("records", "turns", "num_tokens", "num_supervised", "num_images", "num_weights"), "I32"),
    **dict.fromkeys(("spans", "ids"), "I32"),
    "weights": "F32",
    **dict.fromkeys(("supervised", "image_is_used"), "BOOL"),
    **dict.fromkeys(("image_paths", "faults"), "U8"),
}
"""By tensor, in the order of the file, its type as safetensors names it: the widest first, so that all are aligned."""
_NUMPY = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "F32": "<f4", "BOOL": "?", "U8": "u1"}
_CHECKSUM = re.compile(rb'"crc32": "([0-9a-f]{8})"')
_NO_CHECKSUM = b'"crc32": "00000000"'
_BLOCK = 2**22
"""Bytes that are read at once for the checksum."""
_NO_FILE: Version = (-1, -1, -1)

Images = dict[str, tuple[Version, bool]]
"""By path, the version of the file there, and whether an encoded sample has it."""


class CannotWriteError(OSError):
    """The file system does not take a store."""


@contextmanager
def writing() -> Iterator[None]:
    """Turn what the file system refuses inside into CannotWriteError."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(error.errno, error.strerror, error.filename) from None


class EncodedStore(SampleArrays):
    """The encoded samples of an opened file, which stay on the disk. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError where the file is not there or not as it was written."""
        self._path = path
        self._header, self._start = _checked_header(path)
        self._content = np.memmap(path, np.uint8, mode="r")
        super().__init__(**{name: self._mapped(name) for name in CHUNK_ARRAYS})
        self.faults = [Fault(*fault) for fault in json.loads(self._mapped("faults").tobytes())]
        """Training refuses these samples."""
        notes = json.loads(self._header["__metadata__"]["notes"])
        self.notes = {kind: Note(*note) for kind, note in notes.items()}
        """By kind."""
        self._token_ends = self.num_tokens.cumsum(dtype=np.int64)
        self._span_ends = self.num_images.cumsum(dtype=np.int64)
        self._weight_ends = self.num_weights.cumsum(dtype=np.int64)

    @property
    def num_records(self) -> int:
        """The records up to the last of the samples."""
        return int(self.records[-1]) + 1 if len(self.records) else 0

    def tokens(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and supervised flags of a sample, (num_tokens,) each."""
        end = int(self._token_ends[index])
        start = end - int(self.num_tokens[index])
        return self.ids[start:end].copy(), self.supervised[start:end].copy()

    def weights_of(self, index: int) -> tuple[float, ...]:
        """The weights of a sample's trained turns, none if all are 1."""
        end = int(self._weight_ends[index])
        return tuple(self.weights[end - int(self.num_weights[index]) : end].tolist())

    def spans_of(self, index: int) -> npt.NDArray[np.int32]:
        """The rows of `spans` that are a sample's."""
        end = int(self._span_ends[index])
        return self.spans[end - int(self.num_images[index]) : end]

    def num_placeholders(self, index: int) -> int:
        """Placeholders of images in a sample."""
        return int(self.spans_of(index)[:, 2].sum())

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self._content)

    @property
    def image_files(self) -> set[Path]:
        """The images of encoded samples that are files."""
        return {Path(path) for path, (_, is_used) in self.images() if is_used}

    def images(self) -> Iterator[tuple[str, tuple[Version, bool]]]:
        """Each path at which an image was looked for, the version of the file there, and whether it is used."""
        content, start = self._mapped("image_paths"), 0
        ends = np.flatnonzero(content == 0)
        for end, version, is_used in zip(
            ends, self._mapped("image_versions"), self._mapped("image_is_used"), strict=True
        ):
            size, changed, status_changed = version.tolist()
            yield os.fsdecode(content[start:end].tobytes()), ((size, changed, status_changed), bool(is_used))
            start = int(end) + 1

    def is_current(self, tick: Callable[[], None]) -> bool:
        """Whether every image is the file that was measured, and none of those that were missing is there."""
        for path, (version, _) in self.images():
            tick()
            if _version(path) != version:
                return False
        return True

    def block(self, name: str) -> "_Block":
        """A tensor, to be read into memory and not through the map, whose pages would stay there."""
        dtype, shape, start, end = self._layout(name)
        count, offset = (end - start) // dtype.itemsize, self._start + start
        return _Block(shape, lambda: np.fromfile(self._path, dtype, count, offset=offset))

    def _mapped(self, name: str) -> npt.NDArray[Any]:
        dtype, shape, start, end = self._layout(name)
        return np.asarray(self._content[self._start + start : self._start + end]).view(dtype).reshape(shape)

    def _layout(self, name: str) -> tuple[np.dtype[Any], list[int], int, int]:
        """A tensor's type, shape, and its first byte and last byte + 1 after the header."""
        found = self._header[name]
        return np.dtype(_NUMPY[found["dtype"]]), found["shape"], *found["data_offsets"]


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of a tensor."""

    shape: Sequence[int]
    read: Callable[[], npt.NDArray[Any]]


_Tensors = dict[str, list[_Block]]
"""For each tensor the blocks that it consists of, one after the other."""


def write_chunk(path: Path, chunk: EncodedChunk) -> None:
    """Write the store of a chunk. Raises CannotWriteError."""
    sought = {file: (_version(file), False) for file in chunk.sought_files}
    images: Images = sought | {file: (_version(file), True) for file in chunk.image_files}
    arrays = {name: [_block(getattr(chunk, name))] for name in CHUNK_ARRAYS}
    _write(path, arrays | _image_arrays(images) | _fault_arrays(chunk.faults), chunk.notes)


def temporary_store(chunk: EncodedChunk) -> EncodedStore:
    """The store of a chunk that lives as long as it is used. Raises StorageError."""
    with (
        storage_faults("the encoded samples cannot be written as temporary files"),
        tempfile.TemporaryDirectory(prefix="mmtrain-", ignore_cleanup_errors=True) as folder,
    ):
        path = Path(folder) / "chunk.safetensors"
        write_chunk(path, chunk)
        return EncodedStore(path)  # a file that is mapped into memory can be read after it is deleted


def write_joined(path: Path, stores: Sequence[EncodedStore]) -> None:
    """Write the samples of `stores` as one store; of their ids, those of one are in memory at a time.

    Where an image has changed between two of them, the store is not current. Raises CannotWriteError.
    """
    firsts = list(accumulate((len(store.records) for store in stores), initial=0))[:-1]
    images: Images = {}
    for store in stores:
        for file, (version, is_used) in store.images():
            earlier, was_used = images.get(file, (version, False))
            images[file] = earlier, is_used or was_used
    arrays = {name: [store.block(name) for store in stores] for name in CHUNK_ARRAYS}
    faults = merge_faults([(first, store.faults) for first, store in zip(firsts, stores, strict=True)])
    notes = merge_notes([(first, store.notes) for first, store in zip(firsts, stores, strict=True)])
    _write(path, arrays | _image_arrays(images) | _fault_arrays(faults), notes)


def _block(array: npt.NDArray[Any]) -> _Block:
    return _Block(array.shape, lambda: array)


def _bytes(content: bytes) -> _Block:
    return _block(np.frombuffer(content, np.uint8))


def _image_arrays(images: Images) -> _Tensors:
    paths = sorted(images)
    return {
        "image_paths": [_bytes(b"".join(os.fsencode(path) + b"\0" for path in paths))],
        "image_versions": [_block(np.array([images[path][0] for path in paths], np.int64).reshape(-1, 3))],
        "image_is_used": [_block(np.array([images[path][1] for path in paths], np.bool_))],
    }


def _fault_arrays(faults: Sequence[Fault]) -> _Tensors:
    return {"faults": [_bytes(json.dumps([astuple(one) for one in faults]).encode())]}


def _version(path: str) -> Version:
    try:
        return file_version(path)
    except (OSError, ValueError):
        return _NO_FILE


def _write(path: Path, tensors: _Tensors, notes: Mapping[str, Note]) -> None:
    header = _header(tensors, json.dumps({kind: astuple(note) for kind, note in notes.items()}))
    crc = zlib.crc32(header)
    with writing(), path.open("wb") as file:
        file.write(header)
        for name, dtype in _TYPES.items():
            for block in tensors[name]:
                content = block.read().astype(_NUMPY[dtype], copy=False).tobytes()
                crc = zlib.crc32(content, crc)
                file.write(content)
        file.seek(header.index(_NO_CHECKSUM))
        file.write(_NO_CHECKSUM.replace(b"00000000", f"{crc:08x}".encode()))


def _header(tensors: _Tensors, notes: str) -> bytes:
    """The file up to its first tensor, without its checksum."""
    found: dict[str, Any] = {"__metadata__": {"crc32": "00000000", "notes": notes}}
    start = 0
    for name, dtype in _TYPES.items():
        shapes = [block.shape for block in tensors[name]]
        shape = [sum(length for length, *_ in shapes), *shapes[0][1:]]
        end = start + math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its tensors begin. Raises OSError, and ValueError where the checksum is not that
    of the content."""
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little")) if int.from_bytes(length, "little") < 2**40 else b""
        given = _CHECKSUM.search(text)
        crc = zlib.crc32(length + _CHECKSUM.sub(_NO_CHECKSUM, text, 1))
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    if given is None or int(given[1], 16) != crc:
        raise ValueError(f"{path} is damaged: its checksum is not that of its content")
    return json.loads(text), 8 + len(text)
