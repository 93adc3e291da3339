"""Pairs of a data set: equal items are one, and every sample that cannot be used is named with its reason."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmtrain.config.schema import Source
from mmtrain.contrastive.pair_data import PairData, read_pairs
from mmtrain.contrastive.relation import PairItems, relate
from mmtrain.dataset.validate import FaultPolicy
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError, TooLongError
from mmtrain.records.pairs import Item
from mmtrain.records.record_set import RecordSet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def encode(items: Sequence[tuple[Item, Path, str]]) -> list[object]:
    """A model that takes texts of three words, and none with the word `unknown`."""
    return [_made(item.text or "") for item, _, _ in items]


def _made(text: str) -> object:
    words = text.split()
    if len(words) > 3:
        return TooLongError(f"the text has {len(words)} words")
    return SampleError("the model takes no such text") if "unknown" in words else words


def read(folder: Path, records: list[Any], **source: Any) -> PairData:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_pairs(RecordSet([Source(path=str(path), **source)]), encode)


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
    assert data.kinds == ["image", "text", "text", "image"]
    assert [data.item(number).item.text for number in range(4)] == [None, "red", "warm", None]
    assert data.item(3).images[0].source == (tmp_path / "b.png").resolve()
    assert data.item(3).images[0].size == (8, 8)
    relation = relate(list(data.pairs.values()))
    assert relation.queries.tolist() == [0, 1, 3]


def test_the_group_of_the_source_is_in_the_pairs(tmp_path: Path) -> None:
    records = [{"query": "a", "positive": "b", "product": 1}, {"query": "c", "positive": "d", "product": 1}]
    data = read(tmp_path, records, group="product")
    assert [pair.group for pair in data.pairs.values()] == ["1", "1"]


def faulty(folder: Path) -> PairData:
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
    )


def test_every_fault_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        faulty(tmp_path).used(FaultPolicy())
    faults = [fault.removeprefix(f"{tmp_path}/pairs.jsonl:") for fault in caught.value.faults]
    assert [fault[0] for fault in faults] == ["2", "3", "4", "5", "6"]
    assert "'none.png'" in faults[0]
    assert "No such file" in faults[0]
    assert "'half.png'" in faults[1]
    assert "does not decode" in faults[1]
    assert "no known format of pairs" in faults[2]
    assert faults[3].endswith("the text has 4 words; or set data.too_long to drop")
    assert faults[4].endswith("the model takes no such text")


def test_the_policy_leaves_samples_out_and_names_them(tmp_path: Path) -> None:
    used, left_out = faulty(tmp_path).used(FaultPolicy("drop", "skip", 4))
    assert used.tolist() == [0]
    assert [index for index, _ in left_out] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="4 of 6 samples have faults, over the 3"):
        faulty(tmp_path).used(FaultPolicy("drop", "skip", 3))


def test_no_sample_left_is_an_error(tmp_path: Path) -> None:
    data = read(tmp_path, [{"query": "one two three four", "positive": "b"}])
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: dropped, no sample is left: the text has 4 words"):
        data.used(FaultPolicy("drop"))
