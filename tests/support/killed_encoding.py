"""Encodes a data set in processes that are killed: run as a program with a model, a file of records and a folder.

The n-th process is killed at its n-th change of a file or folder, and the next one finishes its work. Prints a list
with an object for each n: the records that the second one encoded, the SHA-256 of the store, what is left besides it.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mmtrain.config.data_section import Source
from mmtrain.dataset import encode_all, store, store_pieces
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.progress import Progress, Task

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def kill_at(number: int) -> None:
    """Kill this process before its `number`-th change."""
    changes: list[str] = []

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            changes.append(event)
            if len(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def encode(spec: EncodingSpec, processor: ChatProcessor, counted: Path, last_change: int | None) -> bool:
    """Encode in a process of its own, killed before its change `last_change`. Returns whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    if last_change is not None:
        kill_at(last_change)
    numbers: list[int] = []
    Task.advance = lambda self, number=1: numbers.append(number)  # type: ignore[method-assign]
    store.open_store(spec, spec.records(), processor, Progress(quiet=True))
    counted.write_text(str(sum(numbers)))
    os._exit(0)


def main(model: str, data: str, folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode_all._CHUNK, store_pieces._TOKENS = 2, 1
    spec, processor = EncodingSpec(model, (Source(path=data),), "assistant", True), load_processor(model)
    found: list[dict[str, Any]] = []
    is_whole = False
    while not is_whole:
        cache, counted = folder / str(len(found)), folder / "counted"
        os.environ["XDG_CACHE_HOME"] = str(cache)
        is_whole = encode(spec, processor, counted, len(found) + 1)
        assert encode(spec, processor, counted, None)
        (path,) = (cache / "mmtrain" / "encoded").glob("*.safetensors")
        left = sorted(one.name for one in path.parent.iterdir() if one != path and one.suffix != ".lock")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append({"encoded": int(counted.read_text()), "sha256": digest, "left": left})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
