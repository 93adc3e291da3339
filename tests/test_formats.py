"""The record shapes people have become conversations, or are refused with the reason."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text
from mmtrain.records.formats import MAX_TEXT, read_record

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")

ASKED: dict[str, Any] = {"role": "user", "content": "Q"}
SAID = {"role": "assistant", "content": "A"}
SAID_MESSAGE = Message("assistant", (Text("A"),))


def chat(*parts: Text | Image, answer: str = "A") -> Conversation:
    return Conversation((Message("user", parts), Message("assistant", (Text(answer),))))


def openai(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, SAID]}


def marked(text: Any, *images: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, SAID], "images": list(images)}


def llava(text: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}], **more}


def refusal(record: Any, record_format: str = "auto") -> str:
    with pytest.raises(SampleError) as caught:
        read_record(record, record_format)
    assert str(caught.value).isprintable()
    return str(caught.value)


TEXT_PART = {"type": "text", "text": "Q"}

RECORDS = {
    "text": (openai("Q"), chat(Text("Q"))),
    "a string as content": ({"messages": [ASKED, SAID]}, chat(Text("Q"))),
    "a mark without a list of images is text": (
        {"messages": [{"role": "user", "content": "<image>Q"}, SAID]},
        chat(Text("<image>Q")),
    ),
    "image_url with a path": (
        openai({"type": "image_url", "image_url": {"url": "a/b.png"}}, TEXT_PART),
        chat(Image("a/b.png"), Text("Q")),
    ),
    "image_url as a string": (openai({"type": "image_url", "image_url": "a.png"}), chat(Image("a.png"))),
    "image_url with detail": (
        openai({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        chat(Image("a.png")),
    ),
    "an image part": (openai({"type": "image", "image": "a.png"}), chat(Image("a.png"))),
    "an image part with a path": (openai({"type": "image", "path": "a.png"}), chat(Image("a.png"))),
    "an image part with a url": (openai({"type": "image", "url": "file:///x/a.png"}), chat(Image("/x/a.png"))),
    "file addresses": (
        openai(*({"type": "image", "image": f"file://{host}/x/a%20b%C3%A9.png"} for host in ("", "localhost"))),
        chat(Image("/x/a bé.png"), Image("/x/a bé.png")),
    ),
    "a data URI": (
        openai(
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"PNG").decode()}}
        ),
        chat(Image("data URI", b"PNG")),
    ),
    "images anywhere between text": (
        openai(
            {"type": "text", "text": "one "},
            {"type": "image", "image": "1.png"},
            {"type": "text", "text": " two "},
            {"type": "image", "image": "2.png"},
            {"type": "image", "image": "3.png"},
            {"type": "text", "text": "."},
        ),
        chat(Text("one "), Image("1.png"), Text(" two "), Image("2.png"), Image("3.png"), Text(".")),
    ),
    "a mark in an OpenAI text part is text": (
        openai({"type": "image", "image": "1.png"}, {"type": "text", "text": "what is <image>?"}),
        chat(Image("1.png"), Text("what is <image>?")),
    ),
    "one mark": (marked("<image>Q", "a.png"), chat(Image("a.png"), Text("Q"))),
    "a mark on its own line": (marked("<image>\nQ", "a.png"), chat(Image("a.png"), Text("Q"))),
    "a mark at the end": (marked("Q\n<image>", "a.png"), chat(Text("Q"), Image("a.png"))),
    "only one newline belongs to a mark": (
        marked("P\n\n<image>\n\nQ", "a.png"),
        chat(Text("P\n"), Image("a.png"), Text("\nQ")),
    ),
    "spaces do not belong to a mark": (marked("P <image> Q", "a.png"), chat(Text("P "), Image("a.png"), Text(" Q"))),
    "marks side by side": (marked("<image><image>\n<image>", *"abc"), chat(Image("a"), Image("b"), Image("c"))),
    "marks and an empty list of no marks": (marked("Q"), chat(Text("Q"))),
    "a list of turns, each an object": (marked("<image>Q", {"path": "a.png"}), chat(Image("a.png"), Text("Q"))),
    "one image for a list": (
        {"messages": [{"role": "user", "content": "<image>Q"}, SAID], "image": "a.png"},
        chat(Image("a.png"), Text("Q")),
    ),
    "image parts that take from the list": (
        marked([{"type": "image"}, {"type": "text", "text": "Q"}, {"type": "image"}], "a.png", "b.png"),
        chat(Image("a.png"), Text("Q"), Image("b.png")),
    ),
    "LLaVA": (llava("<image>\nQ", image="a.png"), chat(Image("a.png"), Text("Q"))),
    "LLaVA with many images": (
        llava("<image>P<image>Q", image=["a", "b"]),
        chat(Image("a"), Text("P"), Image("b"), Text("Q")),
    ),
    "LLaVA with an images list": (llava("<image>Q", images=["a"]), chat(Image("a"), Text("Q"))),
    "LLaVA without an image": (llava("Q"), chat(Text("Q"))),
    "LLaVA with an id and other keys": (llava("Q", id="7", source="somewhere"), chat(Text("Q"))),
    "ShareGPT with a system text": (
        llava("Q", system="S"),
        Conversation((Message("system", (Text("S"),)), *chat(Text("Q")).messages)),
    ),
    "system turns and many turns": (
        {"messages": [{"role": "system", "content": "S"}, ASKED, SAID, {"role": "user", "content": "R"}, SAID]},
        Conversation(
            (
                Message("system", (Text("S"),)),
                *chat(Text("Q")).messages,
                Message("user", (Text("R"),)),
                SAID_MESSAGE,
            )
        ),
    ),
    "images of several turns in order": (
        {
            "conversations": [
                {"from": "human", "value": "<image>P"},
                {"from": "gpt", "value": "A"},
                {"from": "human", "value": "Q<image>"},
                {"from": "gpt", "value": "A"},
            ],
            "image": ["a", "b"],
        },
        Conversation((*chat(Image("a"), Text("P")).messages, *chat(Text("Q"), Image("b")).messages)),
    ),
    "a turn that is not trained on": (
        {"messages": [ASKED, {**SAID, "train": False}, ASKED, {**SAID, "train": True}]},
        Conversation(
            (
                Message("user", (Text("Q"),)),
                Message("assistant", (Text("A"),), train=False),
                Message("user", (Text("Q"),)),
                SAID_MESSAGE,
            )
        ),
    ),
    "words are kept as they are": (
        {
            "messages": [
                {"role": "user", "content": "  Q\n"},
                {"role": "assistant", "content": "\n A <|im_end|> é \U0001f600 "},
            ]
        },
        chat(Text("  Q\n"), answer="\n A <|im_end|> é \U0001f600 "),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_its_conversation(name: str) -> None:
    record, expected = RECORDS[name]
    before = json.dumps(record)
    assert read_record(record, "auto") == expected
    assert json.dumps(record) == before


@pytest.mark.parametrize("record_format", ["openai", "messages", "conversations"])
def test_a_named_format_is_read(record_format: str) -> None:
    record = {"openai": openai(TEXT_PART), "messages": marked("Q"), "conversations": llava("Q")}[record_format]
    assert read_record(record, record_format) == chat(Text("Q"))


def test_a_named_format_decides_whether_a_mark_stands_for_an_image() -> None:
    record = {"messages": [{"role": "user", "content": "<image>Q"}, SAID]}
    assert read_record(record, "openai") == chat(Text("<image>Q"))
    assert refusal(record, "messages") == "1 <image> mark but 0 images"


FAULTS: dict[str, tuple[Any, list[str]]] = {
    "two marks, one image": (marked("<image><image>Q", "a.png"), ["2 <image> marks", "1 image"]),
    "one mark, two images": (marked("<image>Q", "a.png", "b.png"), ["1 <image> mark", "2 images"]),
    "a mark without an image": (llava("<image>Q"), ["1 <image> mark", "0 images"]),
    "an unknown role": ({"messages": [ASKED, {"role": "critic", "content": "A"}]}, ["unknown role 'critic'"]),
    "no role": ({"messages": [{"content": "Q"}]}, ["turn 1 has 'content', expected 'role' and 'content'"]),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "Q"}]}, ["unknown role"]),
    "an empty answer": ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, ["without text"]),
    "a blank answer": ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, ["without text"]),
    "an answer without parts": ({"messages": [ASKED, {"role": "assistant", "content": []}]}, ["without text"]),
    "an answer of null": ({"messages": [ASKED, {"role": "assistant", "content": None}]}, ["'content' must be text"]),
    "an answer that is a number": ({"messages": [ASKED, {"role": "assistant", "content": 5}]}, ["'5'"]),
    "tool calls": (
        {"messages": [ASKED, {**SAID, "tool_calls": [{"id": 1}]}]},
        ["a call must be an object with a 'name'"],
    ),
    "tools": ({"messages": [ASKED, SAID], "tools": [{"type": "f"}]}, ["a tool must be an object"]),
    "an http image": (openai({"type": "image_url", "image_url": {"url": "http://x/a.png"}}), ["nothing is fetched"]),
    "an https image": (marked("<image>Q", "https://x/a.png"), ["nothing is fetched", "'https://x/a.png'"]),
    "an image in a bucket": (marked("<image>Q", "s3://x/a.png"), ["not a local file"]),
    "a file on another host": (marked("<image>Q", "file://host/a.png"), ["not a local file"]),
    "an address that is none": (marked("<image>Q", "http://[x/a.png"), ["'http://[x/a.png'"]),
    "a data URI that is not base64": (marked("<image>Q", "data:image/png;base64,???"), ["not base64"]),
    "a data URI cut short": (marked("<image>Q", "data:image/png;base64,AAA"), ["not base64"]),
    "a data URI outside ASCII": (marked("<image>Q", "data:image/png;base64,AAé="), ["not base64"]),
    "a video": (llava("<video>Q", video="a.mp4"), ["'video' is not understood: only text and images"]),
    "videos": (
        {**marked("Q"), "videos": ["a.mp4"]},
        ["'videos' is not understood: only text and images"],
    ),
    "audio": (
        {**marked("Q"), "audios": ["a.wav"]},
        ["'audios' is not understood: only text and images"],
    ),
    "a video part": (openai({"type": "video_url", "video_url": {"url": "a.mp4"}}), ["'video_url'", "expected"]),
    "a part without a type": (openai({"texts": "Q"}), ["type 'None'"]),
    "a part whose type is a list": (openai({"type": ["text"], "text": "Q"}), ["expected 'text'"]),
    "a part that is a number": (openai(5), ["expected 'text'"]),
    "a text part without text": (openai({"type": "text"}), ["'text' must be text"]),
    "an image part without an image": (openai({"type": "image"}), ["an image must be a path"]),
    "an image part beyond the list": (
        marked([{"type": "image"}, {"type": "image"}], "a"),
        ["2 <image> marks", "1 image"],
    ),
    "an empty path": (marked("<image>Q", ""), ["1 <image> mark but 0 images"]),
    "a path that is a number": (marked("<image>Q", 5), ["an image must be a path", "'5'"]),
    "bytes that are not base64": (marked("<image>Q", {"bytes": "x"}), ["'bytes' of an image", "not base64"]),
    "bytes that are a number": (marked("<image>Q", {"bytes": 5}), ["must be bytes or base64, not '5'"]),
    "bytes and an address": (marked("<image>Q", {"bytes": "x", "url": "a.png"}), ["keep one"]),
    "an image in an answer": (
        {"messages": [ASKED, {"role": "assistant", "content": "<image>A"}], "images": ["a"]},
        ["assistant", "only the user's"],
    ),
    "an image in a system turn": (
        {"messages": [{"role": "system", "content": [{"type": "image", "image": "a"}]}, ASKED, SAID]},
        ["system", "only the user's"],
    ),
    "train that is no truth value": (
        {"messages": [ASKED, {**SAID, "train": "no"}]},
        ["'train' must be true, false, 1 or 0", "'no'"],
    ),
    "no turns": ({"messages": []}, ["no turns"]),
    "turns that are an object": ({"messages": {"role": "user"}}, ["'messages' must be a list"]),
    "a turn that is a string": ({"messages": ["Q"]}, ["list of turns, each an object"]),
    "conversations of null": ({"conversations": None}, ["no known format", "'conversations'"]),
    "conversations that are a text": ({"conversations": "Q"}, ["'conversations' must be a list"]),
    "no keys": ({}, ["no known format", "no keys"]),
    "a list": ([1, 2], ["expected an object"]),
    "null": (None, ["expected an object"]),
    "a lone surrogate in a text": ({"messages": [{"role": "user", "content": "\ud800"}]}, ["surrogate"]),
    "a lone surrogate in a part": (openai({"type": "text", "text": "\udfff"}), ["surrogate"]),
    "a lone surrogate in a bare part": (openai("\ud800"), ["surrogate"]),
    "a lone surrogate between marks": (marked(["\ud800<image>"], "a"), ["surrogate"]),
    "a lone surrogate in a system text": (llava("Q", system="\ud800"), ["surrogate"]),
    "a strange key": ({"a\nb\u2028\x1b[31m" * 30: 1}, ["no known format"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_record_is_refused_with_the_reason(name: str) -> None:
    record, words = FAULTS[name]
    refused = refusal(record)
    for word in words:
        assert word in refused
    assert len(refused) < 300


@pytest.mark.parametrize(
    ("record", "record_format"),
    [
        ({"messages": [ASKED, SAID], "images": ["a.png"]}, "openai"),
        ({**llava("<image>Q", image="a.png"), "images": ["b.png"]}, "auto"),
    ],
    ids=["images next to OpenAI messages", "an image next to another"],
)
def test_an_image_never_vanishes(record: dict[str, Any], record_format: str) -> None:
    assert "image" in refusal(record, record_format)


@pytest.mark.parametrize(
    "record",
    [llava("Q", system=5), {"messages": [ASKED, SAID], "system": "S"}],
    ids=["a system text that is a number", "a system text next to messages"],
)
def test_a_system_text_never_vanishes(record: dict[str, Any]) -> None:
    try:
        conversation = read_record(record, "auto")
    except SampleError as error:
        refused = str(error)
        assert "system" in refused
    else:
        assert conversation.messages[0] == Message("system", (Text(str(record["system"])),))


def test_a_weight_of_zero_on_an_answer_does_not_pass_silently() -> None:
    """OpenAI's fine-tuning files say with "weight": 0 that an answer is not trained on."""
    try:
        conversation = read_record({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}, "auto")
    except SampleError as error:
        refused = str(error)
        assert "weight" in refused
    else:
        assert [message.train for message in conversation.messages if message.role == "assistant"] == [False, True]


def trained(*answers: dict[str, Any]) -> list[bool]:
    messages = [turn for answer in answers for turn in (ASKED, {**SAID, **answer})]
    return [m.train for m in read_record({"messages": messages}, "auto").messages if m.role == "assistant"]


@pytest.mark.parametrize("key", ["train", "trainable", "loss", "weight"])
def test_a_turn_says_in_four_ways_whether_it_is_trained_on(key: str) -> None:
    assert trained({key: False}, {key: True}, {key: 0}, {key: 1}, {key: 0.0}, {key: None}, {}) == [
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    expected = "a number from 0 to 1,000" if key == "weight" else "true, false, 1 or 0"
    for value in (-1, "false", "0", [0], {"a": 1}) if key == "weight" else (0.5, 2, -1, "false", "0", [0], {"a": 1}):
        assert f"'{key}' must be {expected}" in refusal({"messages": [ASKED, {**SAID, key: value}]})
    assert f"'{key}' is on in a turn of the user" in refusal({"messages": [{**ASKED, key: True}, SAID]})
    assert read_record({"messages": [{**ASKED, key: False}, SAID]}, "auto").messages[1].train


def test_two_switches_of_a_turn_must_agree() -> None:
    assert trained({"loss": False, "weight": 0}, {"train": True, "weight": 1.0}) == [False, True]
    assert "'train' and 'loss' of a turn contradict" in refusal(
        {"messages": [ASKED, {**SAID, "train": True, "loss": 0}]}
    )


# --- keys ---

# Keys that people's data have and that would change what is trained on: by the place where they are.
MEANT = {
    "objects": {"bbox": [[1, 2, 3, 4]]},
    "bbox": [1, 2, 3, 4],
    "label": False,
    "rejected": "B",
    "rejected_images": ["a.png"],
    "video": "a.mp4",
    "audios": ["a.wav"],
    "picture": "a.png",
    "image_path": "a.png",
    "img": ["a.png"],
    "loss": False,
    "weight": 2.0,
    "mask": [1],
    "conversation2": [1],
    "reward": 0.0,
}
MEANT_OF_TURN = {
    "mask": True,
    "videos": ["a.mp4"],
    "prefix": False,
    "name": "Bob",
}
MEANT_OF_PART = {"max_pixels": 100, "resized_height": 28, "bbox": [1], "video": "a.mp4"}


@pytest.mark.parametrize("key", MEANT)
@pytest.mark.parametrize(
    "record", [{"messages": [ASKED, SAID]}, llava("<image>Q", image="a.png")], ids=["openai", "llava"]
)
def test_a_key_of_a_record_that_could_matter_is_refused_by_name(record: dict[str, Any], key: str) -> None:
    refused = refusal({**record, key: MEANT[key]})
    assert f"the key '{key}' is not understood" in refused
    assert "data.ignore_fields" in refused
    assert read_record({**record, key: MEANT[key]}, "auto", frozenset({key})) == read_record(record, "auto")


@pytest.mark.parametrize("key", MEANT_OF_TURN)
def test_a_key_of_a_turn_that_could_matter_is_refused_by_name(key: str) -> None:
    for turns_key, turns in (
        ("messages", [ASKED, {**SAID, key: MEANT_OF_TURN[key]}]),
        ("conversations", [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", key: MEANT_OF_TURN[key]}]),
    ):
        assert f"'{key}' of turn 2 is not understood" in refusal({turns_key: turns})
        assert read_record({turns_key: turns}, "auto", frozenset({key})) == chat(Text("Q"))


@pytest.mark.parametrize("key", MEANT_OF_PART)
@pytest.mark.parametrize("part", [TEXT_PART, {"type": "image", "image": "a.png"}], ids=["text", "image"])
def test_a_key_of_a_part_that_could_matter_is_refused_by_name(part: dict[str, Any], key: str) -> None:
    record = openai(TEXT_PART, {**part, key: MEANT_OF_PART[key]})
    assert f"'{key}' of a part of turn 1 is not understood" in refusal(record)
    assert read_record(record, "auto", frozenset({key})) == read_record(openai(TEXT_PART, part), "auto")


def test_every_key_that_is_not_understood_is_named_at_once() -> None:
    refused = refusal({"messages": [{**ASKED, "x": 1}, {**SAID, "y": 1}], "bbox": [1], "id": 1})
    assert "the keys 'bbox', 'x' of turn 1, 'y' of turn 2 are not understood" in refused
    assert "and 6 more" in refusal({"messages": [ASKED], **{f"k{i}": 1 for i in range(10)}})


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_an_empty_value_says_nothing_and_passes(value: Any) -> None:
    extra = {"tools": value, "videos": value, "bbox": value}
    turn = {**SAID, "tool_calls": value, "function_call": value, "refusal": value, "loss": None}
    part = {**TEXT_PART, "annotations": value}
    assert read_record({"messages": [{"role": "user", "content": [part]}, turn], **extra}, "auto") == chat(Text("Q"))


def test_metadata_pass_wherever_they_are() -> None:
    """As in LLaVA, ShareGPT4V, InternVL, OpenHermes, OpenAI's exports and the like."""
    more = {"id": "7", "source": "s", "dataset": "d", "timestamp": 1, "tags": ["t"], "meta": {"a": 1}, "license": "MIT"}
    more |= {"uid": "u", "language": "en", "width": 3, "height": 4, "question_id": 5, "model": "m", "created_at": "x"}
    turn = {"id": 1, "timestamp": 2, "message_id": "a"}
    part = {**TEXT_PART, "id": 3, "index": None}
    record = {"messages": [{"role": "user", "content": [part], **turn}, {**SAID, **turn}], **more}
    assert read_record(record, "auto") == chat(Text("Q"))
    assert read_record(llava("<image>Q", image="a.png", **more), "auto") == chat(Image("a.png"), Text("Q"))


def test_metadata_that_name_an_image_are_refused_where_the_record_has_none() -> None:
    for key in ("id", "file_name", "url", "image_id"):
        refused = refusal({"messages": [ASKED, SAID], key: "images/a.JPG"})
        assert f"'{key}'" in refused
        assert "no image" in refused
        assert read_record({"messages": [ASKED, SAID], key: "a.JPG"}, "auto", frozenset({key})) == chat(Text("Q"))
        assert read_record(llava("<image>Q", image="a.png", **{key: "a.png"}), "auto").images == (Image("a.png"),)


def test_turns_under_two_keys_are_refused() -> None:
    assert "'messages' is not understood" in refusal({**llava("Q"), "messages": [ASKED, SAID]})


def test_ignored_keys_are_as_if_they_were_not_there() -> None:
    record = {"messages": [ASKED, {**SAID, "loss": False, "x": 1}], "x": {"y": [1]}, "images": ["a.png"]}
    before = json.dumps(record)
    found = read_record(record, "auto", frozenset({"x", "images"}))
    assert [message.train for message in found.messages] == [True, False]
    assert found.images == ()
    assert json.dumps(record) == before
    with pytest.raises(SampleError, match="no known format"):
        read_record(record, "auto", frozenset({"messages"}))


def test_the_index_of_an_image_part_must_be_its_place_in_the_list() -> None:
    """As in HuggingFaceH4/llava-instruct-mix-vsft; taking them in order would swap two images silently."""
    parts = [{"type": "image", "text": None, "index": i} for i in (0, 1)]
    text = {"type": "text", "text": "Q", "index": None}
    assert read_record(marked([*parts, text], "a", "b"), "auto") == chat(Image("a"), Image("b"), Text("Q"))
    assert "index '1'" in refusal(marked([*parts[::-1], text], "a", "b"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png", "url": "b.png"},
        {"type": "text", "text": "Q", "value": "R"},
        {"type": "image_url", "image_url": {"url": "a.png", "path": "b.png"}},
    ],
)
def test_one_of_two_values_of_a_part_never_vanishes(part: dict[str, Any]) -> None:
    assert "keep one" in refusal(openai(part, TEXT_PART))


def test_image_parts_with_paths_next_to_an_empty_list_are_read() -> None:
    assert read_record(marked([{"type": "image", "image": "a.png"}, TEXT_PART]), "auto") == chat(
        Image("a.png"), Text("Q")
    )
    assert "0 <image> marks but 1 image" in refusal(marked([{"type": "image", "image": "a.png"}, TEXT_PART], "b.png"))


def test_text_that_would_take_gigabytes_to_tokenize_is_refused() -> None:
    assert read_record(openai("x" * (MAX_TEXT - 1)), "auto").messages[0].text
    refused = refusal(openai("x" * MAX_TEXT))
    assert f"{MAX_TEXT + 1:,} characters" in refused
    assert f"{MAX_TEXT:,} allowed" in refused


# --- real files ---


def real_records(file: str) -> list[Any]:
    text = (SHARED / file).read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.split("\n") if line.strip()] if file.endswith(".jsonl") else json.loads(text)
    )


# The number of records in each, as the lines or items of the file count.
SUPPORTED = {
    "chat_demos/llama_factory/data/mllm_demo.json": 6,
    "chat_demos/llama_factory/data/v1_multimodal_demo.jsonl": 24,
    "chat_demos/ms_swift_tests/chatml.jsonl": 3,
    "chat_demos/ms_swift_tests/conversations.jsonl": 3,
    "chat_demos/qwen_vl_finetune/demo/single_images.json": 3,
    "chat_demos/torchtune_tests/tests/assets/chat_tiny.json": 1,
    "open/charts/charts.json": 24,
    "open/flags/flags.jsonl": 263,
    "open/shapes_vqa/train.json": 3665,
    "open/shapes_vqa/test.json": 736,
    "open/shapes_vqa/train_multiturn.jsonl": 300,
    "open/shapes_vqa/train_two_images.jsonl": 300,
}

NOT_SUPPORTED = {
    "chat_demos/llama_factory/data/mllm_video_demo.json": "'videos' is not understood: only text and images",
    "chat_demos/qwen_vl_finetune/demo/video.json": "'video' is not understood: only text and images",
    "chat_demos/llava/llava/eval/table/caps_boxes_coco2014_val_80.jsonl": "no known format",
    "chat_demos/llava/playground/data/coco2014_val_qa_eval/qa90_questions.jsonl": "no known format",
    "chat_demos/ms_swift_tests/multi_modal_2.jsonl": "nothing is fetched",
    "chat_demos/ms_swift_tests/multi_modal_3.jsonl": "nothing is fetched",
    "chat_demos/ms_swift_tests/swift_pre.jsonl": "no known format",
}

ROLES = {"human": "user", "gpt": "assistant"}


def plain_turns(record: Any) -> list[tuple[str, str]]:
    """Roles and words of a record, images left out: another way through the three shapes."""
    turns = []
    for turn in record.get("messages") or record["conversations"]:
        role = turn.get("role") or turn["from"]
        content = turn["content"] if "content" in turn else turn["value"]
        if isinstance(content, str):
            words = re.sub(r"\n?<image>\n?", "", content)
        else:
            words = "".join(part.get("text") or part["value"] for part in content if part["type"] == "text")
        turns.append((ROLES.get(role, role), words))
    return turns


def plain_images(record: Any) -> list[str]:
    if "image" in record or "images" in record:
        value = record.get("images") or record["image"]
        return value if isinstance(value, list) else [value]
    parts = [
        part for turn in record.get("messages", []) if not isinstance(turn["content"], str) for part in turn["content"]
    ]
    return [part["value"] for part in parts if part["type"] == "image_url"]


@needs_shared
@pytest.mark.parametrize("file", SUPPORTED)
def test_a_real_file_is_read_whole(file: str) -> None:
    records = real_records(file)
    assert len(records) == SUPPORTED[file]
    for record in records:
        conversation = read_record(record, "auto")
        assert [(message.role, message.text) for message in conversation.messages] == plain_turns(record)
        assert [image.name for image in conversation.images] == plain_images(record)


@needs_shared
@pytest.mark.parametrize("file", NOT_SUPPORTED)
def test_a_real_file_of_another_shape_is_refused(file: str) -> None:
    records = real_records(file)
    assert records
    for record in records:
        assert NOT_SUPPORTED[file] in refusal(record)


# Read by tests/test_shapes.py against what they should become.
OTHER_SHAPES = {
    "chat_demos/ms_swift_tests/alpaca.jsonl",
    "chat_demos/ms_swift_tests/sharegpt.jsonl",
    "chat_demos/ms_swift_tests/swift_multi.json",
    "chat_demos/ms_swift_tests/swift_multi.jsonl",
    "chat_demos/ms_swift_tests/swift_single.jsonl",
    "chat_demos/ms_swift_tests/multi_modal_1.jsonl",
    "chat_demos/llava/playground/data/coco2014_val_gpt4_qa_30x3.jsonl",
    "chat_demos/torchtune_tests/tests/assets/instruct_tiny.json",
    "chat_demos/torchtune_tests/tests/assets/vqa_tiny.json",
    "chat_demos/xcomposer/data/multi_turn_multi_images_example.json",
    "chat_demos/xcomposer/data/only_text_example.json",
    "chat_demos/xcomposer/data/single_turn_single_image_example.json",
}


@needs_shared
def test_every_real_file_is_in_one_of_the_lists() -> None:
    found = {
        f"{file.relative_to(SHARED)}" for name in ("chat_demos", "open") for file in (SHARED / name).rglob("*.json*")
    }
    assert found - {"chat_demos/llama_factory/data/dataset_info.json"} == {*SUPPORTED, *NOT_SUPPORTED, *OTHER_SHAPES}
