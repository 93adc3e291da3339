"""Features of pictures as files: one a picture, whole or not at all, checked when read.

Processes and runs may share a folder. Nothing here is needed for a result, so nothing here can fail a run: a file that
is broken is removed, and where nothing can be written nothing is kept.
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

from mmtrain.atomic_files import move_into_place, temporary_path
from mmtrain.dataset.image_inputs import Features

_SCAN_SHARE = 8
"""The folder is measured again once this part of the room found last is used: other processes write too."""
_LOWERED = 0.9
"""To what share of the limit files are removed."""


class FeatureFolder:
    """The files of one model, `root`/`model`, among those of all models, which together take `limit` bytes at most.

    Over the limit the least recently used go, but none that was used since this was made: every epoch needs them all.
    `say` is told why nothing more is written.
    """

    def __init__(self, root: Path, model: str, limit: float, say: Callable[[str], None]) -> None:
        self._root, self._folder = root, root / model
        self._limit, self._say = limit, say
        self._begun = time.time()
        self.is_writing = True
        """Until a file cannot be written."""
        self._budget = 0.0

    def read(self, key: str) -> Features | None:
        """None where there is no file or a broken one, which is removed."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        try:
            found = _unpack(key, raw)
        except Exception:  # whatever a broken file makes the reader raise
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
            with temporary_path(path, str(os.getpid())) as made:
                made.write_bytes(raw)
                move_into_place(path, made, durable=False)  # it is checked when it is read
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
        """The bytes that may be written, after what is old was removed where `size` would go over the limit."""
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
    """When each file of all models was last used, its bytes and its path."""
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
    """Raises anything where `raw` is not what `_pack` made for `key`."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors, count = load(raw), int(header["num_placeholders"])
    if header["sha256"] != _digest(key, count, tensors):
        raise ValueError("not the bytes that were written")
    parts: dict[str, dict[str, Tensor]] = {"tensors": {}, "inputs": {}}
    for name, value in tensors.items():
        part, _, own = name.partition("/")
        parts[part][own] = value
    return Features(parts["tensors"], parts["inputs"], count)


def _digest(key: str, num_placeholders: int, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all that is read back: a file under another picture's name is not taken for it."""
    found = hashlib.sha256(f"{key} {num_placeholders}".encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
