"""Pairs of a data set: equal items are one, and every sample that cannot be used is named with its reason."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmtrain.config.data_section import Data, TrainSource
from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.pair_samples import PairSamples, read_pairs
from mmtrain.contrastive.relation import PairItems, relate
from mmtrain.dataset.validate import FaultPolicy, LengthLimit
from mmtrain.encoding.encode import Encoded, ImageSpan
from mmtrain.encoding.images import Roots, find_image
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class Words:
    """An embedder that takes texts of three words, and none with the word `unknown`."""

    def limit(self, max_length: int) -> LengthLimit:
        return LengthLimit(max_length, "the test")

    def encode(self, items: Sequence[tuple[Item, Roots]]) -> list[EncodedItem | SampleError]:
        return [self._encode(item, root) for item, root in items]

    def _encode(self, item: Item, root: Roots) -> EncodedItem | SampleError:
        words = (item.text or "").split()
        if "unknown" in words:
            return SampleError("the model takes no such text")
        try:
            images = tuple(ImageSpan(find_image(image, root), 0, 0, 0) for image in item.images)
        except SampleError as error:
            return error
        ids = np.zeros(len(words), np.int32)
        return EncodedItem("image" if images else "text", Encoded(ids, ids > 0, images), len(words), 1.0, 0.0)


def read(folder: Path, records: list[Any], policy: FaultPolicy | None = None, **source: Any) -> PairSamples:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    embedder: Any = Words()
    sources = (TrainSource(path=str(path), **source),)
    return read_pairs(sources, embedder, Data(train=sources, max_length=3), policy=policy)


def image(folder: Path, name: str, colour: str) -> str:
    PIL.Image.new("RGB", (8, 8), colour).save(folder / name)
    return name


def test_equal_items_have_one_number(tmp_path: Path) -> None:
    red, copy, blue = (image(tmp_path, *one) for one in (("r.png", "red"), ("copy.png", "red"), ("b.png", "blue")))
    data = read(
        tmp_path,
        [
            {"image": red, "text": ["red", "warm"]},
            {"image": copy, "text": "red"},
            {"image": blue, "text": "warm"},
            {"query": "red", "positive": {"image": blue}, "negatives": ["warm"]},
        ],
    )
    assert list(data.pairs.values()) == [
        PairItems(0, (1, 2)),
        PairItems(0, (1,)),
        PairItems(3, (2,)),
        PairItems(1, (3,), (2,)),
    ]
    assert [item.kind for item in data.items] == ["image", "text", "text", "image"]
    assert data.items[3].encoded.images[0].image.source == (tmp_path / "b.png").resolve()
    assert len({item.key for item in data.items}) == 4
    relation = relate(list(data.pairs.values()))
    assert relation.queries.tolist() == [0, 1, 3]


def test_the_group_of_the_source_is_in_the_pairs(tmp_path: Path) -> None:
    records = [{"query": "a", "positive": "b", "product": 1}, {"query": "c", "positive": "d", "product": 1}]
    data = read(tmp_path, records, group="product")
    assert [pair.group for pair in data.pairs.values()] == ["1", "1"]


def faulty(folder: Path, policy: FaultPolicy | None = None) -> PairSamples:
    image(folder, "a.png", "red")
    whole = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: whole.index(b"IDAT") + 6] + whole[-12:])
    return read(
        folder,
        [
            {"image": "a.png", "text": "fine"},
            {"image": "none.png", "text": "b"},
            {"image": "half.png", "text": "b"},
            {"image": "a.png", "label": "b"},
            {"image": "a.png", "text": "one two three four"},
            {"query": "unknown", "positive": "b"},
        ],
        policy,
    )


def test_every_fault_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        faulty(tmp_path)
    faults = [fault.removeprefix(f"{tmp_path}/pairs.jsonl:") for fault in caught.value.faults]
    assert [fault[0] for fault in faults[:-1]] == ["2", "3", "4", "5", "6"]
    assert faults[-1].startswith("data.on_fault: 4 of 6 samples have faults")
    assert "'none.png'" in faults[0]
    assert "No such file" in faults[0]
    assert "'half.png'" in faults[1]
    assert "does not decode" in faults[1]
    assert "no known format of pairs" in faults[2]
    assert faults[3].endswith("4 tokens, over the 3 allowed (the test); or set data.too_long to drop")
    assert faults[4].endswith("the model takes no such text")


def test_the_policy_leaves_samples_out_and_names_them(tmp_path: Path) -> None:
    data = faulty(tmp_path, FaultPolicy("drop", "skip", 4))
    assert data.used.tolist() == [0]
    assert [index for index, _ in data.left_out] == [1, 2, 3, 4, 5]
    assert [index for index, _ in data.dropped] == [4]
    with pytest.raises(UserError, match="4 of 6 samples have faults, over the 3"):
        faulty(tmp_path, FaultPolicy("drop", "skip", 3))


def test_no_sample_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: dropped, no sample is left: 4 tokens"):
        read(tmp_path, [{"query": "one two three four", "positive": "b"}], FaultPolicy("drop"))


def test_bytes_of_images_stay_in_their_file(tmp_path: Path) -> None:
    """A table of images is not read into memory, and `loaded` gives the right one."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [
        (tmp_path / image(tmp_path, f"{colour}.png", colour)).read_bytes() for colour in ("red", "green", "red")
    ]
    table = {"image": [{"bytes": content, "path": "x.png"} for content in contents], "caption": ["a", "b", "c"]}
    parquet.write_table(arrow.table(table), tmp_path / "pairs.parquet")
    embedder: Any = Words()
    sources = (TrainSource(path=str(tmp_path / "pairs.parquet")),)
    data = read_pairs(sources, embedder, Data(train=sources, max_length=3))
    assert list(data.pairs.values()) == [PairItems(0, (1,)), PairItems(2, (3,)), PairItems(0, (4,))]
    assert [item.encoded.images[0].image.source for item in (data.items[0], data.items[2])] == [b"", b""]
    loaded = data.loaded([2, 1, 0])
    assert [span.image.source for item in loaded for span in item.encoded.images] == [contents[1], contents[0]]
    assert [item.key for item in loaded] == [data.items[number].key for number in (2, 1, 0)]
