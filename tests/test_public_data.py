"""Files as public data sets have them: each becomes the right conversation, or one line says what to write."""

import base64
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from pydantic import ValidationError

from mmtrain.config.data_section import TrainSource
from mmtrain.encoding.images import find_image
from mmtrain.errors import UserError
from mmtrain.records.chat import Image, SampleError
from mmtrain.records.record_set import RecordSet

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
IMAGE = io.BytesIO()
PIL.Image.new("RGB", (40, 30), "red").save(IMAGE, "PNG")
PNG = IMAGE.getvalue()
B64 = base64.b64encode(PNG).decode()
PROMPT = {"prompt": "Q"}


def text(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def shard(**members: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"0.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def parquet(row: dict[str, Any]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([row]), content)
    return content.getvalue()


def said(source: TrainSource, ignored: frozenset[str]) -> str:
    """The turns of the only conversation, with `<>` for each image that is found."""
    records = RecordSet([source], ignored)
    assert len(records) == 1
    found = records.conversation(0)
    for image in found.images:
        find_image(image, records.roots(0))
    turns = ("".join("<>" if isinstance(part, Image) else part.text for part in turn.parts) for turn in found.messages)
    return " | ".join(turns)


Variant = tuple[str, bytes | Callable[[], bytes], dict[str, Any], str]
"""The name of a file, its content, what the source says about it, and the turns or words of the refusal."""

READ: dict[str, Variant] = {
    "the_cauldron": (
        "a.parquet",
        lambda: parquet({"images": [{"bytes": PNG}], "texts": [{"user": "Q", "assistant": "A", "source": "AI2D"}]}),
        {},
        "<>Q | A",
    ),
    "ImageFolder with captions": ("metadata.csv", b"file_name,text\na.png,A\n", PROMPT, "<>Q | A"),
    "ImageFolder with chats": ("metadata.jsonl", text({"file_name": "a.png", "messages": TURNS}), {}, "<>Q | A"),
    "Donut": (
        "metadata.jsonl",
        text({"file_name": "a.png", "ground_truth": '{"gt_parse": 1}'}),
        {"prompt": "Q", "fields": {"completion": "ground_truth"}},
        '<>Q | {"gt_parse": 1}',
    ),
    "Flickr8k": ("captions.csv", b'image,caption\na.png,"A, B"\n', PROMPT, "<>Q | A, B"),
    "Flickr30k": (
        "results.csv",
        b"image_name| comment_number| comment\na.png| 0| A\n",
        {"prompt": "Q", "fields": {"image": "image_name", "caption": "comment"}, "ignore": ["comment_number"]},
        "<>Q | A",
    ),
    "a table that pandas wrote": ("a.csv", b",question,answer\n0,Q,A\n", {}, "Q | A"),
    "a table with semicolons": ("a.csv", b"question;answer\nQ, R;A\n", {}, "Q, R | A"),
    "a table with tabs": ("a.csv", b"question\tanswer\nQ\tA\n", {}, "Q | A"),
    "base64 for addresses in TSV": (
        "a.tsv",
        b"question\tanswer\timage\nQ\tA\t" + base64.urlsafe_b64encode(PNG) + b"\n",
        {},
        "<>Q | A",
    ),
    "img2dataset": (
        "a.tar",
        shard(jpg=PNG, txt=b"A", json=text({"caption": "A", "key": "0", "width": 40})),
        PROMPT,
        "<>Q | A",
    ),
    "images and texts in a shard": ("a.tar", shard(jpg=PNG, txt=b"A"), PROMPT, "<>Q | A"),
    "lines in a .json": ("a.json", text({"messages": TURNS}), {}, "Q | A"),
    "OpenAI's batches": (
        "a.jsonl",
        text({"custom_id": "1", "body": {"model": "m", "messages": TURNS}}),
        {"fields": {"messages": "body.messages"}, "ignore": ["body"]},
        "Q | A",
    ),
    "Label Studio": (
        "a.json",
        text([{"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": [{"value": {"text": ["A"]}}]}]}]),
        {
            "fields": {"image": "data.image", "caption": "annotations.0.result.0.value.text.0"},
            "ignore": ["data", "annotations"],
            "prompt": "Q",
        },
        "<>Q | A",
    ),
    "several answers": (
        "a.jsonl",
        text({"question": "Q", "answers": ["A", "B"], "image_id": 7}),
        {
            "fields": {"answer": "answers.0", "image": "{image_id:03}.png", "question": "question"},
            "ignore": ["answers"],
        },
        "<>Q | A",
    ),
    "an answer that is a number": (
        "a.jsonl",
        text({"question": "Q", "answer": 3}),
        {"fields": {"answer": "{answer}"}},
        "Q | 3",
    ),
    "an answer that is an object": (
        "a.jsonl",
        text({"question": "Q", "answer": {"total": 1.5, "shop": "Café", "lines": [{"n": None}]}}),
        {"fields": {"answer": "{answer}"}},
        'Q | {"total": 1.5, "shop": "Café", "lines": [{"n": null}]}',
    ),
    "backslashes": ("a.jsonl", text({"question": "Q", "answer": "A", "image": "deep\\b.png"}), {}, "<>Q | A"),
    "decomposed letters": ("a.jsonl", text({"question": "Q", "answer": "A", "image": "u\u0308.png"}), {}, "<>Q | A"),
    "no image in a list": ("a.jsonl", text({"messages": TURNS, "images": [None]}), {}, "Q | A"),
    "MMMU's marks": (
        "a.jsonl",
        text({"question": "See <image 1>.", "answer": "A", "image": "a.png"}),
        {},
        "See <>. | A",
    ),
    "images of a turn": (
        "a.jsonl",
        text([{"role": "<|User|>", "content": "<image>Q", "images": ["a.png"]}, {"role": "Assistant", "content": "A"}]),
        {},
        "<>Q | A",
    ),
    "images of two turns": (
        "a.jsonl",
        text(
            {"messages": [dict(TURNS[0], images=["a.png", "ü.png"]), TURNS[1], dict(TURNS[0], image="a.png"), TURNS[1]]}
        ),
        {},
        "<><>Q | A | <>Q | A",
    ),
    "images of a pair": (
        "a.jsonl",
        text({"conversations": [{"images": ["a.png"], "user": "<|image_1|>\nQ", "assistant": "A"}]}),
        {},
        "<>Q | A",
    ),
    "images by their marks": (
        "a.jsonl",
        text(
            {
                "image": {"<image_00>": "a.png", "<image_01>": "ü.png"},
                "conversations": [dict(TURNS[0], content="<image_00> or <image_01>?"), TURNS[1]],
            }
        ),
        {},
        "<> or <>? | A",
    ),
    "marks from 0": (
        "a.jsonl",
        text({"question": "<image_0>, <image_1>", "answer": "A", "images": ["a.png", "ü.png"]}),
        {},
        "<>, <> | A",
    ),
    "Bedrock": (
        "a.jsonl",
        text(
            {
                "schemaVersion": "bedrock-conversation-2024",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"image": {"format": "png", "source": {"bytes": B64}}}, {"text": "Q"}],
                    },
                    {"role": "assistant", "content": [{"text": "A"}]},
                ],
            }
        ),
        {},
        "<>Q | A",
    ),
    "messages in a shard": (
        "a.tar",
        shard(jpg=PNG, json=text([dict(TURNS[0], content="<image>Q"), TURNS[1]])),
        {},
        "<>Q | A",
    ),
    "a record over several lines": ("a.json", b'{\n"question": "Q",\n"answer": "A"}\n', {}, "Q | A"),
    "a record over several lines of .jsonl": ("a.jsonl", b'{\n"question": "Q",\n"answer": "A"}\n', {}, "Q | A"),
    "a key of an image": (
        "a.jsonl",
        text(
            {
                "messages": [
                    dict(TURNS[0], content=[{"type": "image_url", "image_url": {"url": "a.png", "image_wh": [1, 2]}}]),
                    TURNS[1],
                ]
            }
        ),
        {"ignore": ["image_wh"]},
        "<> | A",
    ),
}

HINTS: dict[str, Variant] = {
    "VERL": (
        "a.jsonl",
        text(
            {
                "data_source": "geo",
                "prompt": [dict(TURNS[0], content="<image>Q")],
                "images": ["a.png"],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "A"},
                "extra_info": {"answer": "long", "question": "q"},
            }
        ),
        {},
        "<>Q | A",
    ),
    "ScienceQA": (
        "a.jsonl",
        text({"image": "a.png", "question": "Q", "choices": ["x", "y"], "answer": 1, "hint": "h", "solution": "s"}),
        {},
        "<>Q\nA. x\nB. y | B",
    ),
    "choices and a response": (
        "a.jsonl",
        text({"query": "Q", "options": ["x", "y"], "response": "A"}),
        {},
        "Q\nA. x\nB. y | A",
    ),
    "AI2D": (
        "a.jsonl",
        text({"image": "a.png", "question": "Q", "options": ["x", "y"], "answer": "0"}),
        {},
        "<>Q\nA. x\nB. y | A",
    ),
    "A-OKVQA": (
        "a.jsonl",
        text({"image": "a.png", "question": "Q", "choices": ["x", "y"], "correct_choice_idx": 1, "rationales": ["r"]}),
        {},
        "<>Q\nA. x\nB. y | B",
    ),
    "MMMU": (
        "a.jsonl",
        text(
            {"question": "See <image 1>.", "options": "['x']", "answer": "A", "image_1": "a.png", "img_type": "['p']"}
        ),
        {},
        "See <>.\n['x'] | A",
    ),
    "NLVR2": (
        "a.jsonl",
        text({"question": "Q", "left_image": "a.png", "right_image": "ü.png", "answer": "True"}),
        {},
        "<><>Q | True",
    ),
    "Argilla": (
        "a.jsonl",
        text(
            {
                "id": 1,
                "status": "done",
                "fields": {"prompt": "Q"},
                "responses": {"label": [{"value": "A", "user_id": 1}]},
            }
        ),
        {},
        "Q | A",
    ),
    "Llama-Stack": ("a.jsonl", text({"dialog": TURNS}), {}, "Q | A"),
    "OpenAI's batches": ("a.jsonl", text({"custom_id": "1", "url": "/v1", "body": {"messages": TURNS}}), {}, "Q | A"),
    "TextVQA": (
        "a.jsonl",
        text({"question": "Q", "image": "a.png", "answers": ["A", "B"], "ocr_tokens": ["t"], "set_name": "train"}),
        {},
        "<>Q | A",
    ),
    "preferences": ("a.jsonl", text({"prompt": "Q", "chosen": "A", "rejected": "B"}), {}, "Q | A"),
    "preferences of turns": ("a.jsonl", text({"chosen": TURNS, "rejected": TURNS}), {}, "Q | A"),
    "preferences of OpenAI": (
        "a.jsonl",
        text({"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": TURNS[1:]}),
        {},
        "Q | A",
    ),
    "preferences of LLaMA-Factory": (
        "a.jsonl",
        text({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1], "images": ["a.png"]}),
        {},
        "<>Q | A",
    ),
    "columns in another language": ("a.csv", "Frage;Antwort;画像\nQ;A;a.png\n".encode(), {}, "<>Q | A"),
    "many keys": ("a.jsonl", text({"question": "Q", "answer": "A", **{f"k {n}": n for n in range(1, 9)}}), {}, "Q | A"),
    "Flickr30k": ("a.csv", b"image_name|comment_number|comment\na.png|0|A\n", PROMPT, "<>Q | A"),
    "a class and a box": ("a.csv", b"filename,class,xmin,ymin\na.png,A,1,2\n", PROMPT, "<>Q | A"),
    "boxes of Label Studio": (
        "a.jsonl",
        text({"image": "a.png", "label": [{"x": 1, "rectanglelabels": ["A"]}]}),
        PROMPT,
        '<>Q | [{"x": 1, "rectanglelabels": ["A"]}]',
    ),
    "an image by its number": ("a.jsonl", text({"question": "Q", "answer": "A", "image_id": "a"}), {}, "<>Q | A"),
}
"""What the refusal says to write, and nothing else, makes the conversation."""

REFUSED: dict[str, Variant] = {
    "two tables of VQA": ("a.json", b'{\n"questions": [{"id": 1}]}', {}, "docs/data.md has a script for COCO and VQA"),
    "a list in an object": ("a.json", b'{\n"data": [{"question": "Q"}]}', {}, "json.load(open('FILE'))['data']"),
    "an object of records": (
        "a.json",
        b'{"1": {"question": "Q"}, "2": {"question": "Q"}}',
        {},
        "list(json.load(open('FILE')).values())",
    ),
    "InternVL's list of files": (
        "a.json",
        b'{"x": {"root": "images/", "annotation": "x.jsonl", "repeat_time": 1}}',
        {},
        "the first as {path: x.jsonl, root: images/}",
    ),
    "a pointer of Git LFS": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", {}, "`git lfs pull`"),
    "UTF-16 without a mark": ("a.jsonl", '{"question": "Q"}'.encode("utf-16-le"), {}, "save the file as UTF-8"),
    "a list that Python wrote": ("a.csv", b"messages\n\"[{'role': 'user'}]\"\n", {}, "write it with json.dumps"),
    "no names of columns": ("a.tsv", b"A cat\thttp://x/a.jpg\nA dog\thttp://x/b.jpg\n", {}, "must name the columns"),
    "an image that is not named": (
        "a.jsonl",
        text({"question": "Q", "answer": "A", "image_id": 7}),
        {},
        "has no image",
    ),
    "images of an assistant": (
        "a.jsonl",
        text({"messages": [TURNS[0], dict(TURNS[1], images=["a.png"])]}),
        {},
        "only the user's turns can have images",
    ),
    "images twice": (
        "a.jsonl",
        text({"messages": [dict(TURNS[0], images=["a.png"]), TURNS[1]], "images": ["a.png"]}),
        {},
        "both the record and a turn list images",
    ),
    "choices in the question": (
        "a.jsonl",
        text({"question": "Q\nA. x", "choices": ["x"], "answer": 0}),
        {},
        "if they are, set `data.ignore_fields: [choices]`",
    ),
    "a number after the letters": (
        "a.jsonl",
        text({"question": "Q", "answer": 26}),
        {"fields": {"answer": "{answer:letter}"}},
        "must be 0 to 25, not '26'",
    ),
    "an object that JSON lacks": (
        "a.parquet",
        lambda: parquet({"question": "Q", "answer": {"image": b"x"}}),
        {"fields": {"answer": "{answer}"}},
        "the column 'answer' cannot be written as JSON",
    ),
    "choices that are no list": (
        "a.jsonl",
        text({"question": "Q", "choices": 5, "answer": "A"}),
        {"fields": {"question": "{question}{choices:letters}"}},
        "must be a list, not '5'",
    ),
    "KTO": (
        "a.jsonl",
        text({"prompt": "Q", "completion": "A", "label": False}),
        {},
        "preference pairs are not trained on",
    ),
    "a column that is there twice": (
        "a.jsonl",
        text({"question": "Q", "answer": "A", "image": "x", "decoded": "a.png"}),
        {"fields": {"image": "decoded"}},
        "add origin: image",
    ),
    "a workbook": ("a.xlsx", b"PK", {}, "save the table as CSV in UTF-8"),
    "UTF-16": ("a.csv", "question,answer\nQ,A\n".encode("utf-16"), {}, "save the file as UTF-8"),
    "NaN": ("a.jsonl", b'{"question": "Q", "answer": NaN}\n', {}, "NaN is not JSON: write null"),
    "captions without a question": ("metadata.csv", b"file_name,text\na.png,A\n", {}, "set `prompt` of the source"),
    "a prompt twice": ("a.jsonl", text({"prompt": "P", "completion": "A"}), PROMPT, "have a `prompt`: keep one"),
    "a missing entry": (
        "a.jsonl",
        text({"a": [1]}),
        {"fields": {"answer": "a.3"}},
        "'a.3', which is not in the record",
    ),
    "another text in a shard": (
        "a.tar",
        shard(txt=b"B", json=text({"text": "A", "prompt": "Q"})),
        {},
        "'0.txt' is another text than that of the record",
    ),
    "an image of another kind": (
        "a.jsonl",
        text({"question": "Q", "answer": "A", "image": "a.heic"}),
        {},
        "not an image of a known kind (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM): save it as one of them",
    ),
    "a format in a template": ("a.jsonl", b"{}", {"fields": {"image": "{a:>9}"}}, "expected the name of a column"),
}


def found(folder: Path, variant: Variant) -> str:
    name, content, spec, _ = variant
    (folder / "deep").mkdir()
    (folder / "images").mkdir()
    for image in ("a.png", "007.png", "deep/b.png", "ü.png", "images/a.jpg"):
        (folder / image).write_bytes(PNG)
    (folder / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content())
    keys = {key: value for key, value in spec.items() if key != "ignore"}
    return said(TrainSource(path=str(folder / name), **keys), frozenset(spec.get("ignore", ())))


@pytest.mark.parametrize("name", READ)
def test_public_data_is_read(tmp_path: Path, name: str) -> None:
    assert found(tmp_path, READ[name]) == READ[name][3]


@pytest.mark.parametrize("name", HINTS)
def test_what_a_refusal_says_to_write_is_enough(tmp_path: Path, name: str) -> None:
    file, content, spec, turns = HINTS[name]
    (tmp_path / "first").mkdir()
    with pytest.raises(SampleError) as caught:
        found(tmp_path / "first", (file, content, {}, turns))
    fields, ignored = (
        match and yaml.safe_load(match[1])
        for match in (re.search(rf"`{key}: (.*?)`", str(caught.value)) for key in ("fields", r"data\.ignore_fields"))
    )
    (tmp_path / "second").mkdir()
    said_now = found(
        tmp_path / "second", (file, content, {**spec, "fields": fields or {}, "ignore": ignored or []}, turns)
    )
    assert said_now == turns


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_what_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises((SampleError, UserError, ValidationError)) as caught:
        found(tmp_path, REFUSED[name])
    assert REFUSED[name][3] in str(caught.value)
