"""Every shape of record × the pair it becomes; what is refused, and by which words."""

import base64
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.data_section import Source
from mmtrain.dataset.pair_items import item_keys
from mmtrain.records.chat import Image, Message, SampleError, Text
from mmtrain.records.formats import read_record
from mmtrain.records.pair_shapes import PAIR_SHAPES, recognise_pair
from mmtrain.records.pairs import Item, Pair, read_pair
from mmtrain.records.record_set import RecordSet

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CAT = Item(None, (Image("cat.png"),))


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def paired(query: Item, *positives: Item, negatives: tuple[Item, ...] = (), group: str | None = None) -> Pair:
    return Pair(query, positives, negatives, group)


RECORDS: dict[str, tuple[dict[str, Any], Pair]] = {
    "image and text": ({"image": "cat.png", "text": "a cat"}, paired(CAT, Item("a cat"))),
    "image and caption": ({"image": "cat.png", "caption": "a cat"}, paired(CAT, Item("a cat"))),
    "several captions": (
        {"image": "cat.png", "caption": ["a cat", "an animal"], "id": 3},
        paired(CAT, Item("a cat"), Item("an animal")),
    ),
    "captions as JSON": ({"image": "cat.png", "text": '["a cat", "b"]'}, paired(CAT, Item("a cat"), Item("b"))),
    "a text that begins with a bracket": ({"image": "cat.png", "text": "[sic] cat"}, paired(CAT, Item("[sic] cat"))),
    "an image within the text": (
        {"messages": said("Is <image> in <image>?"), "images": ["a.png", "b.png"], "positive_messages": [said("b")]},
        paired(
            Item(
                "Is  in ?",
                (Image("a.png"), Image("b.png")),
                parts=(Text("Is "), Image("a.png"), Text(" in "), Image("b.png"), Text("?")),
            ),
            Item("b"),
        ),
    ),
    "images before the text": (
        {"query": {"text": "<image><image>which?", "images": ["a.png", "b.png"]}, "positive": "b"},
        paired(Item("which?", (Image("a.png"), Image("b.png"))), Item("b")),
    ),
    "images of a shard": (
        {"images": [{"bytes": PNG, "path": "k.png"}], "text": "a cat"},
        paired(Item(None, (Image("k.png", PNG),)), Item("a cat")),
    ),
    "query": ({"query": "pets", "positive": "a cat"}, paired(Item("pets"), Item("a cat"))),
    "query with all": (
        {
            "query": {"text": "this one", "image": "q.png"},
            "instruction": "Find it.",
            "positive": [{"text": "a", "image": "cat.png"}, {"images": ["cat.png"]}],
            "negatives": ["b", {"image": "dog.png", "instruction": "Look."}],
        },
        paired(
            Item("this one", (Image("q.png"),), "Find it."),
            Item("a", (Image("cat.png"),)),
            CAT,
            negatives=(Item("b"), Item(None, (Image("dog.png"),), "Look.")),
        ),
    ),
    "an image as a table stores it": (
        {"query": {"bytes": PNG, "path": "q.png"}, "positive": "a"},
        paired(Item(None, (Image("q.png", PNG),)), Item("a")),
    ),
    "ms-swift": (
        {
            "messages": [{"role": "system", "content": "Find it."}, *said("<image>which?")],
            "images": ["cat.png"],
            "positive_messages": [said("<image>a"), said("b")],
            "positive_images": [["p.png"], []],
            "negative_messages": [said("c")],
        },
        paired(
            Item("which?", (Image("cat.png"),), "Find it."),
            Item("a", (Image("p.png"),)),
            Item("b"),
            negatives=(Item("c"),),
        ),
    ),
    "VLM2Vec": (
        {
            "qry": "<|image_1|>\nWhat is it?",
            "qry_image_path": "cat.png",
            "pos_text": "a cat",
            "pos_image_path": "",
            "neg_text": "",
            "neg_image_path": "dog.png",
        },
        paired(Item("What is it?", (Image("cat.png"),)), Item("a cat"), negatives=(Item(None, (Image("dog.png"),)),)),
    ),
    "VLM2Vec without a negative": (
        {"qry": "q", "qry_image_path": "", "pos_text": "p", "neg_text": "", "neg_image_path": ""},
        paired(Item("q"), Item("p")),
    ),
    "VLM2Vec, an evaluation": (
        {
            "qry_text": "q",
            "qry_img_path": "",
            "tgt_text": ["<|image_1|>\nlook", "<|image_1|>"],
            "tgt_img_path": ["cat.png", "dog.png"],
        },
        paired(Item("q"), Item("look", (Image("cat.png"),)), negatives=(Item(None, (Image("dog.png"),)),)),
    ),
    "NeMo Automodel": (
        {"question": "q", "question_id": "7", "pos_doc": ["a", {"text": "b", "image": ""}], "neg_doc": ["c"]},
        paired(Item("q"), Item("a"), Item("b"), negatives=(Item("c"),)),
    ),
    "NeMo Automodel, a query": ({"query": "q", "pos_doc": "a", "neg_doc": []}, paired(Item("q"), Item("a"))),
}


@pytest.mark.parametrize("case", RECORDS)
def test_every_shape_becomes_its_pair(case: str) -> None:
    record, expected = RECORDS[case]
    assert read_pair(record) == expected


def test_every_shape_has_a_case() -> None:
    assert {recognise_pair(record) for record, _ in RECORDS.values()} == set(PAIR_SHAPES) - {
        shape for shape in PAIR_SHAPES if shape.needs == ("images", "caption")
    }


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "expected an object"),
    "an unknown key": ({"image": "a.png", "text": "t", "score": 0.5}, "'score' is not understood"),
    "an unknown key of an item": ({"query": "q", "positive": {"text": "t", "score": 1}}, "'score' is not understood"),
    "a key of NeMo Automodel": (
        {"question": "q", "pos_doc": {"text": "t", "nr_ocr": "x"}},
        "'nr_ocr' is not understood",
    ),
    "a chat": ({"query": "q", "response": "r"}, "no known format of pairs"),
    "no positive": ({"query": "q", "positive": []}, "there is no positive"),
    "an empty text": ({"query": "q", "positive": ["a", " "]}, "positive 2 has neither text nor an image"),
    "a number": ({"query": "q", "positive": 5}, "positive 1: 'content' must be text"),
    "a mark without an image": (
        {"messages": said("<image>a"), "positive_messages": [said("b")]},
        "the query: 1 <image> mark but 0 images",
    ),
    "two turns": (
        {"messages": said("a"), "positive_messages": [[*said("b"), *said("c")]]},
        "positive 1 has 2 turns",
    ),
    "lists of different lengths": (
        {"messages": said("a"), "positive_messages": [said("b")], "positive_images": [[], []]},
        "1 items in 'positive_messages' but 2 in 'positive_images'",
    ),
    "an image elsewhere": ({"query": "q", "positive": "p", "url": "a.png"}, "the record has no image"),
    "two instructions": (
        {"query": {"text": "q", "instruction": "i"}, "instruction": "j", "positive": "p"},
        "both the record and its query have an 'instruction'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_pair_is_refused_by_its_reason(case: str) -> None:
    record, reason = REFUSED[case]
    with pytest.raises(SampleError) as caught:
        read_pair(record)
    assert reason in str(caught.value)


def test_a_key_is_ignored_where_the_config_says_so() -> None:
    assert read_pair({"query": "q", "positive": "p", "score": 1}, ignored={"score"}) == paired(Item("q"), Item("p"))


def test_the_group_is_the_value_of_its_key() -> None:
    record = {"query": "q", "positive": "p", "product": 12}
    assert read_pair(record, group="product").group == "12"
    assert read_pair(record, group="product", ignored={"product"}).group == "12"
    assert read_pair({**record, "product": None}, group="product").group is None
    with pytest.raises(SampleError, match="no key 'brand', which `group` of the source names"):
        read_pair({"query": "q", "positive": "p"}, group="brand")
    with pytest.raises(SampleError, match="must be text or a whole number"):
        read_pair({**record, "product": [1]}, group="product")


def test_a_chat_with_an_image_stays_a_chat() -> None:
    record = {"messages": [*said("<image>what?"), {"role": "assistant", "content": "a cat"}], "images": ["cat.png"]}
    assert len(read_record(record).messages) == 2
    with pytest.raises(SampleError, match="no known format of pairs"):
        read_pair(record)


def test_an_item_as_a_conversation() -> None:
    item = Item("which?", (Image("cat.png"),), "Find it.")
    assert item.conversation().messages == (
        Message("system", (Text("Find it."),)),
        Message("user", (Image("cat.png"), Text("which?"))),
    )
    assert CAT.conversation().messages == (Message("user", (Image("cat.png"),)),)
    parts = (Text("Is "), Image("cat.png"), Text(" one?"))
    assert Item("Is  one?", (Image("cat.png"),), parts=parts).conversation().messages == (Message("user", parts),)


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_equal_content_is_one_item(tmp_path: Path) -> None:
    for name in ("a.png", "copy.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "other.png").write_bytes(PNG + b"\0")
    items = [
        Item(None, (Image("a.png"),)),
        Item(None, (Image("copy.png"),)),
        Item(None, (Image("bytes", PNG),)),
        Item(None, (Image("other.png"),)),
        Item("a", (Image("a.png"),)),
        Item("a"),
        Item("a", (), "i"),
        Item("a", (Image("a.png"),), parts=(Text("a"), Image("a.png"))),
        Item("a", (Image("copy.png"),), parts=(Text("a"), Image("copy.png"))),
    ]
    keys = item_keys([(item, tmp_path) for item in items])
    assert keys[0] == keys[1] == keys[2]
    assert keys[7] == keys[8]
    assert len(set(keys)) == 6


def test_pairs_of_all_containers(tmp_path: Path) -> None:
    record = {"image": "a.png", "caption": "a cat"}
    lines = write_lines(tmp_path / "a.jsonl", [record, {"image": "a.png", "label": "a dog"}])
    (tmp_path / "b.csv").write_text("file,caption\na.png,a cat\n", encoding="utf-8")
    shard = tmp_path / "c.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("k.json", b'{"text": "a cat"}'), ("k.png", PNG), ("m.png", PNG), ("m.txt", b"a cow\n")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sources = [
        Source(path=str(lines)),
        Source(path=str(tmp_path / "b.csv"), fields={"image": "file"}),
        Source(path=str(shard)),
    ]
    records = RecordSet(sources)
    by_path = paired(Item(None, (Image("a.png"),)), Item("a cat"))
    assert records.pair(0) == records.pair(2) == by_path
    assert records.pair(3) == paired(Item(None, (Image("k.png", PNG),)), Item("a cat"))
    assert records.pair(4) == paired(Item(None, (Image("m.png", PNG),)), Item("a cow"))
    assert str(records.place(1)).endswith("a.jsonl:2")
    with pytest.raises(SampleError, match="no known format of pairs: found 'image', 'label'"):
        records.pair(1)


def test_parquet_has_images_and_lists_of_texts(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [{"bytes": PNG, "path": "a.png"}], "caption": [["a cat", "an animal"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    pair = RecordSet([Source(path=str(tmp_path / "a.parquet"))]).pair(0)
    assert pair == paired(Item(None, (Image("a.png", PNG),)), Item("a cat"), Item("an animal"))


def test_the_records_of_the_docs_are_read() -> None:
    page = (Path(__file__).parents[1] / "docs" / "contrastive.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```jsonl\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    pairs = [read_pair(json.loads(line)) for line in block.splitlines()]
    assert [(len(pair.positives), len(pair.negatives)) for pair in pairs] == [(2, 0), (1, 2), (1, 0)]


def test_a_format_of_conversations_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(SampleError, match="`format: query` is a format of conversations"):
        RecordSet([Source(path=str(path), format="query")]).pair(0)
