"""A thousand mutated files of records and images, also as a stream: no exception of another kind, every fault has its
file and row, and every record that is read is either used or reported."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.shard_order import Position
from mmtrain.dataset.stream import Stream, StreamedWindow
from mmtrain.dataset.validate import FaultPolicy, LengthLimit, check_samples
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.records.sources.open import open_file
from support.builders import TINY, write_jsonl
from test_archives import MEMBERS, make_tar, make_zip, png
from test_containers import lines, mutated, parquet, shard, table

OutcomeOf = Callable[[Source, ChatProcessor], str]
POLICY = FaultPolicy("drop", "skip", 10**9)
ROWS = [{"question": f"Q{i}", "answer": f"A{i}", "image": {"bytes": png("red"), "path": "a.png"}} for i in range(4)]
TEXTS = [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(6)]
PAIRS = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(TEXTS)]
FILES: dict[str, bytes] = {
    "a.parquet": parquet(ROWS),
    "a.tar": shard([member for i, pair in enumerate(PAIRS) for member in (pair, (f"{i}.png", png("blue")))]),
    "a.csv": table(","),
    "a.json": json.dumps(TEXTS, indent=1).encode(),
    "a.jsonl": lines(TEXTS),
}
ARCHIVES = {"zip": make_zip, "tar": make_tar}
ASKED = [{"query": f"What is {name}?", "response": "A", "image": name} for name in (*MEMBERS, *MEMBERS)]


@pytest.fixture(scope="module")
def processor() -> ChatProcessor:
    return load_processor(str(TINY))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def outcome(source: Source, processor: ChatProcessor) -> str:
    """What became of the records; asserts that none is lost and that every fault says where it is."""
    path, named = source.path, (source.path, str(source.root))
    spec = EncodingSpec(str(TINY), (source,), "assistant", True)
    try:
        samples, checked = check_samples(spec, processor, LengthLimit(10_000, "the test"), policy=POLICY)
    except UserError as error:
        for fault in error.faults:
            assert fault.isprintable()
            assert fault.startswith(named), fault
        return "refused"
    reported = dict(checked.left_out)
    assert sorted([*checked.used.tolist(), *reported]) == list(range(len(samples)))
    for index, reason in reported.items():
        assert str(samples.place(index)).startswith(path)
        assert reason.isprintable()
        assert reason
    return "reported" if reported else "read"


def streamed_outcome(source: Source, processor: ChatProcessor) -> str:
    """The same of the first epoch of a stream, in windows of two records."""
    data = {"train": [source.model_dump()], "streaming": {"window": 2}, "on_fault": "skip", "max_skipped": 10**9}
    config = Config.model_validate(
        {
            "model": {"path": str(TINY)},
            "data": data,
            "train": {"steps": 1, "batch_size": 1},
            "run": {"output_dir": "runs/none"},
        }
    )
    windows: dict[Position, StreamedWindow] = {}
    try:
        with closing(Stream(config, processor, LengthLimit(10_000, "the test"))) as stream:
            for step in itertools.count(1):
                windows |= {window.start.position: window for window in stream.begin(step)}
                if any(window.end.position.epoch for window in windows.values()):
                    break
    except UserError as error:
        for fault in error.faults:
            assert fault.isprintable()
            assert fault.startswith((source.path, str(source.root))), fault
        return "refused"
    first = [window for position, window in windows.items() if position.epoch == 0]
    used = [str(window.samples.place(int(index))) for window in first for index in window.order]
    left_out = [(str(place), reason) for window in first for place, reason in window.left_out()]
    places = [*used, *(place for place, _ in left_out)]
    assert len(set(places)) == len(places) == len(open_file(Path(source.path)))
    assert all(place.startswith(source.path) for place in places)
    assert all(reason and reason.isprintable() for _, reason in left_out)
    return "reported" if left_out else "read"


def outcomes(
    number: int, make: Callable[[random.Random], Source], processor: ChatProcessor, of_one: OutcomeOf = outcome
) -> Counter[str]:
    return Counter(of_one(make(random.Random(seed)), processor) for seed in range(number))


NUMBERS = [5, pytest.param(150, marks=pytest.mark.slow("a thousand mutated files are encoded and checked"))]


@pytest.mark.parametrize("of_one", [outcome, streamed_outcome])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_of_records_loses_nothing(
    tmp_path: Path, name: str, number: int, processor: ChatProcessor, of_one: OutcomeOf
) -> None:
    root = write_jsonl(tmp_path / "images" / "x.jsonl", []).parent
    for i in range(5):
        (root / f"{i}.png").write_bytes(png("green"))

    def make(random_: random.Random) -> Source:
        (tmp_path / name).write_bytes(mutated(FILES[name], random_))
        return Source(path=str(tmp_path / name), root=str(root))

    assert of_one(make_unchanged(tmp_path / name, FILES[name], root), processor) == "read"
    found = outcomes(number, make, processor, of_one)
    assert sum(found.values()) == number
    assert found.keys() - {"read"}, found


def make_unchanged(path: Path, content: bytes, root: Path) -> Source:
    path.write_bytes(content)
    return Source(path=str(path), root=str(root))


@pytest.mark.parametrize("of_one", [outcome, streamed_outcome])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_mutated_archive_of_images_loses_nothing(
    tmp_path: Path, kind: str, number: int, processor: ChatProcessor, of_one: OutcomeOf
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ASKED)
    path = ARCHIVES[kind](tmp_path / f"images.{kind}", MEMBERS)
    content = path.read_bytes()

    def make(random_: random.Random) -> Source:
        path.write_bytes(mutated(content, random_))
        return Source(path=str(data), root=str(path))

    assert of_one(Source(path=str(data), root=str(path)), processor) == "read"
    found = outcomes(number, make, processor, of_one)
    assert sum(found.values()) == number
    assert found.keys() - {"read"}, found
