"""The store of a data set: encoded once, and opened from the user's cache from then on.

A store's name is a hash of everything that its content depends on. One that is damaged, or whose images changed, is
made again. Whoever makes a store has a lock, so that the processes of a run make it once. An encoding that was
interrupted has left its finished pieces, and the next one resumes after them.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL
import tokenizers
import transformers

import mmtrain
from mmtrain.atomic_files import replacing
from mmtrain.dataset.encode_all import encode_all
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.hashes import digest
from mmtrain.dataset.store_file import CannotWriteError, EncodedStore, write_joined, writing
from mmtrain.dataset.store_pieces import add_pieces, finished_pieces
from mmtrain.encoding.directory import model_directory, processor_files
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import storage_faults
from mmtrain.file_locks import wait_for_lock
from mmtrain.progress import QUIET, Progress
from mmtrain.records.record_set import RecordSet
from mmtrain.safe_text import counted, visible
from mmtrain.user_cache import cache_folder, remove_unused, used

_VERSION = 7
"""Raised with every change of what the encoder makes or of the file, so that no earlier store is taken."""


def open_store(spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, progress: Progress) -> EncodedStore:
    """The store of `records`, encoded as `spec` says, made if there is none.

    Raises StorageError where there is no room for it.
    """
    name = _name(spec, records, processor, progress.tick)

    def encode(folder: Path) -> list[EncodedStore]:
        pieces = finished_pieces(folder, progress.tick)
        done = pieces[-1].num_records if pieces else 0
        if done:
            progress.say(f"encoding resumes after {done:,} of {counted(len(records), 'record')}")
        with progress.task("encoding", len(records), done) as task:
            add_pieces(folder, pieces, encode_all(spec, records, processor, done), task.advance)
        return pieces

    folder = cache_folder() / "encoded"
    try:
        return _find_or_make(folder, name, encode, progress.tick)
    except CannotWriteError as error:
        why = error.strerror or type(error).__name__
        progress.say(
            f"encoded samples cannot be stored in {visible(str(folder))} ({why}): every start encodes them again"
        )
    with (
        storage_faults("the encoded samples can be written neither to the user's cache nor as temporary files"),
        tempfile.TemporaryDirectory(prefix="mmtrain-", ignore_cleanup_errors=True) as temporary,
    ):
        # a file that is mapped into memory can be read after it is deleted
        return _find_or_make(Path(temporary), name, encode, progress.tick)


def find_store(spec: EncodingSpec, records: RecordSet, processor: ChatProcessor) -> EncodedStore | None:
    """The store of `records`, encoded as `spec` says; None where there is none, or not of these files."""
    try:
        return _find(_path(cache_folder() / "encoded", _name(spec, records, processor, QUIET.tick)), QUIET.tick)
    except OSError:
        return None


def _name(spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, tick: Callable[[], None]) -> str:
    """A hash of all that decides what the encoder makes."""
    depends_on = {
        "versions": [_VERSION, mmtrain.__version__, transformers.__version__, tokenizers.__version__],
        "processor": digest(processor_files(model_directory(spec.model_path)), tick),
        "model": str(processor.image_token_id),
        "end": sorted(processor.tokenizer.traits.eos_ids),
        "template": processor.template.source,
        "images": processor.image_settings,
        "labels": [spec.train_on, spec.end_of_turn, spec.drops_reasoning],
        "ignored": spec.ignored,
        "decoded": [spec.decode_images, PIL.__version__],
        "records": digest([file.path for file in records.files], tick),
        "archives": digest(records.archives, tick),
        "files": [
            [str(file.path.resolve()), [str(root.resolve()) for root in file.roots], file.reading]
            for file in records.files
        ],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _find_or_make(
    folder: Path, name: str, encode: Callable[[Path], list[EncodedStore]], tick: Callable[[], None]
) -> EncodedStore:
    """`encode` makes the pieces of a store in a folder."""
    path, pieces = _path(folder, name), folder / f"{name}.pieces"
    with _locked(folder, name, tick):
        try:
            store = _find(path, tick)
            if store is None:
                remove_unused(folder)
                store = _make(path, encode(pieces))
        except CannotWriteError:
            shutil.rmtree(pieces, ignore_errors=True)  # they take the room that is missing
            raise
        shutil.rmtree(pieces, ignore_errors=True)
        return store


def _make(path: Path, pieces: Sequence[EncodedStore]) -> EncodedStore:
    with writing(), replacing(path, durable=False) as made:  # damage is noticed when it is opened
        write_joined(made, pieces)
        return EncodedStore(made)


def _find(path: Path, tick: Callable[[], None]) -> EncodedStore | None:
    with suppress(OSError, ValueError):
        store = EncodedStore(path)
        if store.is_current(tick):
            used(path)
            return store
    return None


@contextmanager
def _locked(folder: Path, name: str, tick: Callable[[], None]) -> Iterator[None]:
    """Have the lock of a store; another process may be making it."""
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{name}.lock").open("a")
    with file:
        with writing():
            wait_for_lock(file, tick)
        yield
