"""Encoded samples on disk: made once, and opened by memory map from then on.

A store is a folder in the user's cache, named after everything that its content depends on. It holds what the encoder
made, checksums of it, and of every picture what tells whether it changed since; one that does not hold any more is
made anew. Whoever makes it holds a lock, so that the processes of a run make it once.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import tokenizers
import transformers

import mmtrain
from mmtrain.dataset.encode_all import Note, Part, Recipe, encode_all, merge_notes
from mmtrain.dataset.hashes import cache_folder, digest, file_key
from mmtrain.dataset.samples import SampleSet
from mmtrain.encoding.directory import model_directory, processor_files
from mmtrain.errors import storage_faults

_VERSION = 3
"""Raised with every change of what the encoder makes, so that no store of before is taken."""
_UNUSED_SECONDS = 30 * 24 * 3600
"""Stores that nobody opened for so long are removed when another one is made."""
_META = "meta.json"


class Store:
    """An opened store. Raises OSError or ValueError where the folder does not hold what was written to it."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        for name, expected in meta["checksums"].items():
            if _checksum(folder / name) != expected:
                raise ValueError(f"{folder / name} is damaged")
        with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
            self.num_tokens: npt.NDArray[np.int32] = arrays["num_tokens"]
            """(num_samples,) 0 where a sample is refused."""
            self.num_supervised: npt.NDArray[np.int32] = arrays["num_supervised"]
            """(num_samples,)"""
            self.num_pictures: npt.NDArray[np.int32] = arrays["num_pictures"]
            """(num_samples,)"""
            self.spans: npt.NDArray[np.int32] = arrays["spans"]
            """(num_pictures, 5) start, length, placeholders, width, height"""
        self._token_ends = self.num_tokens.cumsum(dtype=np.int64)
        self._span_ends = self.num_pictures.cumsum(dtype=np.int64)
        self._ids = _mapped(folder / "ids.bin", np.dtype(np.int32))
        self._supervised = _mapped(folder / "supervised.bin", np.dtype(np.bool_))
        self._pictures: list[list[Any]] = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
        found = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
        self.faults: list[tuple[int, str, str]] = [(index, kind, reason) for index, kind, reason in found["faults"]]
        """(number of the sample, kind, reason): training refuses these samples."""
        self.notes = {kind: Note(*note) for kind, note in found["notes"].items()}
        """By kind."""

    def tokens(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and supervised flags of a sample."""
        end = int(self._token_ends[index])
        own = slice(end - int(self.num_tokens[index]), end)
        return np.array(self._ids[own]), np.array(self._supervised[own])

    def pictures(self, index: int) -> npt.NDArray[np.int32]:
        """The rows of `spans` that are a sample's."""
        end = int(self._span_ends[index])
        return self.spans[end - int(self.num_pictures[index]) : end]

    @property
    def picture_files(self) -> set[Path]:
        return {Path(key[0]) for key in self._pictures}

    def holds(self, tick: Callable[[], None]) -> bool:
        """Whether every picture is the file that was measured."""
        for key in self._pictures:
            tick()
            try:
                if list(file_key(Path(key[0]))) != key:
                    return False
            except OSError:
                return False
        return True


def open_store(recipe: Recipe, samples: SampleSet, advance: Callable[[int], None], tick: Callable[[], None]) -> Store:
    """The store of the set that `recipe` gives, made if there is none; one with faults is not kept.
    `advance` is told how many samples were encoded, `tick` that something happened.

    Raises StorageError where there is no room for it.
    """
    name = _name(recipe, samples, tick)
    with suppress(_CannotWriteError):
        return _find_or_make(cache_folder() / "encoded", name, recipe, samples, advance, tick)
    with storage_faults("the encoded samples can be written neither to the user's cache nor as temporary files"):
        folder = Path(tempfile.mkdtemp(prefix="mmtrain-"))
        try:
            return _find_or_make(folder, name, recipe, samples, advance, tick)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays until the process ends


class _CannotWriteError(OSError):
    pass


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWriteError(error.errno, error.strerror, error.filename) from None


def _name(recipe: Recipe, samples: SampleSet, tick: Callable[[], None]) -> str:
    """A hash of all that decides what the encoder makes."""
    processor = samples.encoder.processor
    depends_on = {
        "versions": [_VERSION, mmtrain.__version__, transformers.__version__, tokenizers.__version__],
        "processor": digest(processor_files(model_directory(recipe.model_path)), tick),
        "model": str(processor.image_token_id),
        "end": sorted(processor.tokenizer.traits.eos_ids),
        "template": processor.template.source,
        "labels": [recipe.train_on, recipe.end_of_turn],
        "ignored": recipe.ignored,
        "decoded": [recipe.decode_images, PIL.__version__],
        "records": digest([path for path, _, _ in samples.files], tick),
        "files": [[str(path.resolve()), str(root.resolve()), kind] for path, root, kind in samples.files],
    }
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def _find_or_make(
    root: Path,
    name: str,
    recipe: Recipe,
    samples: SampleSet,
    advance: Callable[[int], None],
    tick: Callable[[], None],
) -> Store:
    folder = root / name
    with _locked(root, name, tick):
        store = _found(folder, tick)
        if store is not None:
            return store
        _remove_unused(root)
        with _writing():
            made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        try:
            _write(made, encode_all(recipe, samples), advance)
            if (store := Store(made)).faults:
                return store
            with _writing():
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
            return Store(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def find_store(recipe: Recipe, samples: SampleSet) -> Store | None:
    """The store of the set that `recipe` gives, None where there is none that holds."""
    try:
        return _found(cache_folder() / "encoded" / _name(recipe, samples, lambda: None), lambda: None)
    except OSError:
        return None


def _found(folder: Path, tick: Callable[[], None]) -> Store | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        store = Store(folder)
        if store.holds(tick):
            with suppress(OSError):
                os.utime(folder)
            return store
    return None


def _write(folder: Path, parts: Iterator[Part], advance: Callable[[int], None]) -> None:
    arrays: dict[str, list[Any]] = {"num_tokens": [], "num_supervised": [], "num_pictures": [], "spans": []}
    files: set[str] = set()
    faults: list[tuple[int, str, str]] = []
    notes: list[dict[str, Note]] = []
    with _writing():
        ids, supervised = (folder / "ids.bin").open("wb"), (folder / "supervised.bin").open("wb")
    with ids, supervised:
        for part in parts:
            for name, found in arrays.items():
                found.append(getattr(part, name))
            files |= set(part.files)
            faults += part.faults
            notes.append(part.notes)
            with _writing():
                ids.write(part.ids.tobytes())
                supervised.write(part.supervised.tobytes())
            advance(len(part.num_tokens))
    with _writing():
        joined: dict[str, Any] = {name: np.concatenate(found) for name, found in arrays.items()}
        np.savez(folder / "samples.npz", **joined)
        keys = [file_key(Path(file)) for file in sorted(files)]
        (folder / "pictures.json").write_text(json.dumps(keys), encoding="utf-8")
        findings = {"faults": faults, "notes": {kind: astuple(note) for kind, note in merge_notes(notes).items()}}
        (folder / "findings.json").write_text(json.dumps(findings), encoding="utf-8")
        checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
        (folder / _META).write_text(json.dumps({"checksums": checksums}), encoding="utf-8")


def _checksum(path: Path) -> list[int]:
    """Length and CRC-32."""
    length = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return [length, crc]


def _mapped(path: Path, dtype: "np.dtype[Any]") -> npt.NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


@contextmanager
def _locked(root: Path, name: str, tick: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a store; another process may be making it."""
    with _writing():
        root.mkdir(parents=True, exist_ok=True)
        file = (root / f"{name}.lock").open("a")
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tick()
                time.sleep(0.1)
        yield


def _remove_unused(root: Path) -> None:
    for path in root.iterdir():
        with suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
