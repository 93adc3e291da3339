"""Image features as files: one per image, written completely or not at all, checked when read.

Processes and runs can share a folder. No result depends on the cache, so an error here never stops a run: a broken file
is removed, and if writing fails nothing more is cached.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmtrain.atomic_files import replacing
from mmtrain.dataset.image_inputs import Features

_SCAN_SHARE = 8
"""The folder is measured again after 1 / _SCAN_SHARE of the last measured free space is used: other processes write
too."""
_LOWERED = 0.9
"""Files are removed down to this share of the limit."""


class FeatureFolder:
    """The files of one model, in `root`/`model`. The files of all models in `root` take at most `limit` bytes.

    Over the limit the least recently used are removed, but none that was used since this object was made: every epoch
    needs them all. `say` prints the reason when nothing more is written.
    """

    def __init__(self, root: Path, model: str, limit: float, say: Callable[[str], None]) -> None:
        self._root, self._folder = root, root / model
        self._limit, self._say = limit, say
        self._begun = time.time()
        self.is_writing = True
        """Until a file cannot be written."""
        self._budget = 0.0

    def read(self, key: str) -> Features | None:
        """None if there is no file. A broken file is removed."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        try:
            found = _unpack(key, raw)
        except Exception:  # a broken file can make the reader raise anything
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def write(self, key: str, features: Features) -> None:
        if not self.is_writing:
            return
        raw, path = _pack(key, features), self._path(key)
        try:
            if not self._has_room(len(raw)):
                self._stop(f"{self._limit / 2**30:,.1f} GiB (run.image_cache.disk_gib) are full")
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, str(os.getpid()), durable=False) as made:  # it is checked when it is read
                made.write_bytes(raw)
        except OSError as error:
            self._stop(error.strerror or str(error))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _stop(self, why: str) -> None:
        self.is_writing = False
        self._say(f"no more image features are cached in {self._folder}: {why}")

    def _has_room(self, size: int) -> bool:
        if size > self._budget:
            room = self._make_room(size)
            if room < size:
                return False
            self._budget = max(room / _SCAN_SHARE, size)
        self._budget -= size
        return True

    def _make_room(self, size: int) -> float:
        """The bytes that may be written. Old files are removed first if `size` bytes more would exceed the limit."""
        found = sorted(_files(self._root))
        total = sum(num_bytes for _, num_bytes, _ in found)
        if total + size > self._limit:
            for used, num_bytes, path in found:
                if used >= self._begun or total + size <= _LOWERED * self._limit:
                    break
                with suppress(FileNotFoundError):  # another process was faster
                    os.unlink(path)
                total -= num_bytes
        return self._limit - total


def _files(root: Path) -> list[tuple[float, int, str]]:
    """(time of last use, number of bytes, path) of each file of all models."""
    found = []
    for folder in os.scandir(root) if root.is_dir() else ():
        for entry in os.scandir(folder) if folder.is_dir() else ():
            with suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime, status.st_size, entry.path))
    return found


def _pack(key: str, features: Features) -> bytes:
    tensors = {f"tensors/{name}": value.contiguous() for name, value in features.tensors.items()}
    tensors |= {f"inputs/{name}": value.contiguous() for name, value in features.inputs.items()}
    count = features.num_placeholders
    return save(tensors, {"num_placeholders": str(count), "sha256": _digest(key, count, tensors)})


def _unpack(key: str, raw: bytes) -> Features:
    """Raises any exception if `raw` was not made by `_pack` for `key`."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors, count = load(raw), int(header["num_placeholders"])
    if header["sha256"] != _digest(key, count, tensors):
        raise ValueError("not the bytes that were written")
    groups: dict[str, dict[str, Tensor]] = {"tensors": {}, "inputs": {}}
    for name, value in tensors.items():
        group, _, own = name.partition("/")
        groups[group][own] = value
    return Features(groups["tensors"], groups["inputs"], count)


def _digest(key: str, num_placeholders: int, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of everything that is read back, and of `key`: a file under the name of another image is refused."""
    found = hashlib.sha256(f"{key} {num_placeholders}".encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
