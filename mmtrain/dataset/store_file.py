"""Encoded samples as one safetensors file, read by memory map.

Its tensors, for n samples with t tokens and m images, f of which are files:

records, turns                           (n,) int32: the record, and the turn that alone is trained on or -1
num_tokens, num_supervised, num_images   (n,) int32
num_weights                              (n,) int32: trained turns of a sample in which not every weight is 1, else 0
sum_weights                              (n,) float64: of the weights of its supervised tokens
weights                                  float32: of those turns, the samples one after the other
ids, supervised                          (t,) int32 and bool, the samples one after the other
spans                                    (m, 5) int32: start, length, placeholders, width, height
image_paths                              bytes: the path of each file, closed by a null
image_versions                           (f, 3) int64: size and times of each file when it was measured
faults                                   bytes: JSON, a list of [index, kind, reason]

The header has the notes, as JSON, and a CRC-32 over all of this.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmtrain.dataset.encode_all import EncodedChunk, Fault, Note, merge_notes
from mmtrain.errors import system_error
from mmtrain.user_cache import file_version

_TYPES_OF_CHUNKS = {
    **dict.fromkeys(("records", "turns", "num_tokens", "num_supervised", "num_images", "num_weights", "spans"), "I32"),
    "sum_weights": "F64",
    "weights": "F32",
}
_TYPES = {
    **_TYPES_OF_CHUNKS,
    "ids": "I32",
    "supervised": "BOOL",
    "image_paths": "U8",
    "image_versions": "I64",
    "faults": "U8",
}
"""By tensor, its type as safetensors names it."""
_ROWS = 2**20
"""Rows of a tensor that are read at once for the checksum: a few MB."""


class CannotWriteError(OSError):
    """The file system does not take a store."""


@contextmanager
def writing() -> Iterator[None]:
    """Turn what the file system refuses inside into CannotWriteError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = error if isinstance(error, OSError) else system_error(error)
        if found is None:
            raise
        raise CannotWriteError(found.errno, found.strerror, found.filename) from None


class EncodedStore:
    """The encoded samples of an opened file; the ids stay on the disk. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError where the file is not there or not as it was written."""
        try:
            file: Any = safe_open(path, framework="np")
            found = {name: file.get_slice(name) for name in _TYPES}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        header = file.metadata() or {}
        notes, shapes = header.get("notes", ""), {name: tensor.get_shape() for name, tensor in found.items()}
        if {name: tensor.get_dtype() for name, tensor in found.items()} != _TYPES:
            raise ValueError(f"{path} is damaged: its tensors are of other types")
        if header.get("crc32") != _checksum(notes, found, shapes):
            raise ValueError(f"{path} is damaged: its checksum is not that of its content")
        self.records: npt.NDArray[np.int32] = file.get_tensor("records")
        """(num_samples,) the record of each sample"""
        self.turns: npt.NDArray[np.int32] = file.get_tensor("turns")
        """(num_samples,) the turn that alone is trained on, -1 where the sample is all of its record"""
        self.num_tokens: npt.NDArray[np.int32] = file.get_tensor("num_tokens")
        """(num_samples,) 0 where a sample is refused."""
        self.num_supervised: npt.NDArray[np.int32] = file.get_tensor("num_supervised")
        """(num_samples,)"""
        self.num_images: npt.NDArray[np.int32] = file.get_tensor("num_images")
        """(num_samples,)"""
        self.num_weights: npt.NDArray[np.int32] = file.get_tensor("num_weights")
        """(num_samples,) the weights of its turns that are stored."""
        self.sum_weights: npt.NDArray[np.float64] = file.get_tensor("sum_weights")
        """(num_samples,) the sum of the weights of its supervised tokens."""
        self.spans: npt.NDArray[np.int32] = file.get_tensor("spans")
        """(num_images, 5) start, length, placeholders, width, height"""
        self.faults = [Fault(*fault) for fault in json.loads(file.get_tensor("faults").tobytes())]
        """Training refuses these samples."""
        self.notes = {kind: Note(*note) for kind, note in json.loads(notes).items()}
        """By kind."""
        self._ids, self._supervised = found["ids"], found["supervised"]
        self._token_ends = self.num_tokens.cumsum(dtype=np.int64)
        self._span_ends = self.num_images.cumsum(dtype=np.int64)
        self._weights: npt.NDArray[np.float32] = file.get_tensor("weights")
        self._weight_ends = self.num_weights.cumsum(dtype=np.int64)
        self._image_paths = file.get_tensor("image_paths").tobytes().split(b"\0")[:-1]
        self._image_versions: npt.NDArray[np.int64] = file.get_tensor("image_versions")

    def tokens(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and supervised flags of a sample, (num_tokens,) each."""
        end = int(self._token_ends[index])
        start = end - int(self.num_tokens[index])
        return self._ids[start:end], self._supervised[start:end]

    def weights_of(self, index: int) -> tuple[float, ...]:
        """The weights of a sample's trained turns, none if all are 1."""
        end = int(self._weight_ends[index])
        return tuple(self._weights[end - int(self.num_weights[index]) : end].tolist())

    def spans_of(self, index: int) -> npt.NDArray[np.int32]:
        """The rows of `spans` that are a sample's."""
        end = int(self._span_ends[index])
        return self.spans[end - int(self.num_images[index]) : end]

    def num_placeholders(self, index: int) -> int:
        """Placeholders of images in a sample."""
        return int(self.spans_of(index)[:, 2].sum())

    @property
    def num_bytes(self) -> int:
        """The size of the file, without its header."""
        num_tokens = int(self.num_tokens.sum(dtype=np.int64))
        paths = sum(len(path) + 1 for path in self._image_paths)
        return 5 * num_tokens + 12 * len(self.num_tokens) + self.spans.nbytes + self._image_versions.nbytes + paths

    @property
    def image_files(self) -> set[Path]:
        """The images that are files."""
        return {Path(os.fsdecode(path)) for path in self._image_paths}

    def is_current(self, tick: Callable[[], None]) -> bool:
        """Whether every image is the file that was measured."""
        for path, version in zip(self._image_paths, self._image_versions.tolist(), strict=True):
            tick()
            try:
                if list(file_version(os.fsdecode(path))) != version:
                    return False
            except OSError:
                return False
        return True


def write_store(path: Path, chunks: Iterable[EncodedChunk], advance: Callable[[int], None]) -> None:
    """Write the file of all `chunks`, whose ids go through temporary files: there are more than fit into memory.
    `advance` is given the number of records of each chunk. Raises CannotWriteError.
    """
    arrays: dict[str, list[Any]] = {name: [] for name in _TYPES_OF_CHUNKS}
    files: set[str] = set()
    faults: list[Fault] = []
    notes: list[dict[str, Note]] = []
    num_samples = 0
    with ExitStack() as stack:
        with writing():
            ids, supervised = (stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(2))
        for chunk in chunks:
            for name, own in arrays.items():
                own.append(getattr(chunk, name))
            files.update(chunk.image_files)
            faults += [replace(fault, index=num_samples + fault.index) for fault in chunk.faults]
            notes.append({kind: replace(note, first=num_samples + note.first) for kind, note in chunk.notes.items()})
            num_samples += len(chunk.records)
            with writing():
                ids.write(chunk.ids.tobytes())
                supervised.write(chunk.supervised.tobytes())
            advance(len(np.unique(chunk.records)))
        with writing():
            tensors = {name: np.concatenate(own) for name, own in arrays.items()}
            tensors |= {"ids": _mapped(ids, np.int32), "supervised": _mapped(supervised, np.bool_)}
            tensors |= _image_tensors(files) | {"faults": _bytes(json.dumps([astuple(one) for one in faults]).encode())}
            _save(path, tensors, merge_notes(notes))


def _save(path: Path, tensors: dict[str, npt.NDArray[Any]], notes: dict[str, Note]) -> None:
    text = json.dumps({kind: astuple(note) for kind, note in notes.items()})
    checksum = _checksum(text, tensors, {name: list(tensor.shape) for name, tensor in tensors.items()})
    save_file(tensors, path, {"notes": text, "crc32": checksum})


def _image_tensors(files: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    paths = sorted(files)
    versions = np.array([file_version(path) for path in paths], np.int64).reshape(-1, 3)
    return {"image_paths": _bytes(b"".join(os.fsencode(p) + b"\0" for p in paths)), "image_versions": versions}


def _bytes(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


def _mapped(file: BinaryIO, dtype: type[np.generic]) -> npt.NDArray[Any]:
    file.flush()
    return np.memmap(file, dtype, mode="r") if file.tell() else np.zeros(0, dtype)


def _checksum(notes: str, tensors: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> str:
    """CRC-32 over `notes` and each tensor's name, shape and content, some rows of it at a time."""
    crc = zlib.crc32(notes.encode())
    for name in _TYPES:
        length, *_ = shapes[name]
        crc = zlib.crc32(f"{name} {shapes[name]}".encode(), crc)
        for start in range(0, length, _ROWS):
            rows: npt.NDArray[Any] = tensors[name][start : min(start + _ROWS, length)]
            crc = zlib.crc32(rows.data, crc)
    return f"{crc:08x}"
