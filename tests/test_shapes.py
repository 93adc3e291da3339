"""Every shape of record × the conversation it becomes."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.data_section import RecordFormat
from mmtrain.records.chat import Conversation, Image, Message, Part, Role, SampleError, Text
from mmtrain.records.fields import map_fields
from mmtrain.records.formats import read_record
from mmtrain.records.shapes import SHAPE_NAMES
from mmtrain.records.shapes import SHAPES as SHAPE_ROWS

SHARED = Path(__file__).parents[2] / "shared" / "data"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PNG_BASE64 = base64.b64encode(PNG).decode()


Turn = tuple[Role, Any]


def talk(*turns: Turn) -> Conversation:
    """A text or a list of parts for each turn."""
    parts: list[tuple[Part, ...]] = [
        (Text(content),) if isinstance(content, str) else tuple(content) for _, content in turns
    ]
    return Conversation(tuple(Message(role, content) for (role, _), content in zip(turns, parts, strict=True)))


ASKED: Turn = ("user", "Q")
SAID: Turn = ("assistant", "A")
SYSTEM: Turn = ("system", "S")
EARLIER: tuple[Turn, Turn] = (("user", "P"), ("assistant", "B"))
TWO_TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
WITH_IMAGE: Turn = ("user", [Image("a.png"), Text("Q")])


SHAPES: dict[str, tuple[str, Any, Conversation]] = {
    "alpaca": ("alpaca", {"instruction": "Q", "output": "A"}, talk(ASKED, SAID)),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "Do", "input": "this", "output": "A"},
        talk(("user", "Do\nthis"), SAID),
    ),
    "alpaca with all": (
        "alpaca",
        {"instruction": "Q", "input": "", "output": "A", "history": [["P", "B"]], "system": "S"},
        talk(SYSTEM, *EARLIER, ASKED, SAID),
    ),
    "alpaca without a system text": ("alpaca", {"instruction": "Q", "output": "A", "system": ""}, talk(ASKED, SAID)),
    "alpaca with a response": ("alpaca", {"instruction": "Q", "response": "A"}, talk(ASKED, SAID)),
    "alpaca with an image": ("alpaca", {"instruction": "Q", "output": "A", "image": "a.png"}, talk(WITH_IMAGE, SAID)),
    "alpaca with marks": (
        "alpaca",
        {"instruction": "<image>\nQ", "output": "A", "images": ["a.png"]},
        talk(WITH_IMAGE, SAID),
    ),
    "query and response": (
        "query",
        {"query": "Q", "response": "A", "history": [["P", "B"]], "system_prompt": "S"},
        talk(SYSTEM, *EARLIER, ASKED, SAID),
    ),
    "a history as JSON text": (
        "query",
        {"query": "Q", "response": "A", "history": '[["P", "B"]]'},
        talk(*EARLIER, ASKED, SAID),
    ),
    "images before a history": (
        "query",
        {"query": "Q", "response": "A", "history": [["P", "B"]], "images": ["a.png", "b.png"]},
        talk(("user", [Image("a.png"), Image("b.png"), Text("P")]), EARLIER[1], ASKED, SAID),
    ),
    "the old form of Qwen-VL": (
        "conversations",
        {
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\n<img>b.png</img>\nQ"},
                {"from": "assistant", "value": "A"},
            ]
        },
        talk(
            ("user", [Text("Picture 1: "), Image("a.png"), Image("b.png"), Text("Q")]),
            SAID,
        ),
    ),
    "question and answer": ("question", {"question": "Q", "answer": "A", "image": "a.png"}, talk(WITH_IMAGE, SAID)),
    "input and output": ("input", {"input": "Q", "output": "A", "image": "a.png"}, talk(WITH_IMAGE, SAID)),
    "prompt and completion": ("prompt", {"prompt": "Q", "completion": "A"}, talk(ASKED, SAID)),
    "prompt and response": ("prompt", {"prompt": "Q", "response": "A"}, talk(ASKED, SAID)),
    "a prompt of turns": (
        "prompt",
        {"prompt": [{"role": "system", "content": "S"}, TWO_TURNS[0]], "completion": [TWO_TURNS[1]]},
        talk(SYSTEM, ASKED, SAID),
    ),
    "Mantis": (
        "conversation",
        {"conversation": [{"role": "user", "content": "<image>Q"}, TWO_TURNS[1]], "images": ["a.png"], "id": "x"},
        talk(WITH_IMAGE, SAID),
    ),
    "pairs of human and assistant": (
        "conversation",
        {"conversation": [{"human": "P", "assistant": "B"}, {"human": "Q", "assistant": "A"}], "system": "S"},
        talk(SYSTEM, *EARLIER, ASKED, SAID),
    ),
    "conversations with role and content": ("conversations", {"conversations": TWO_TURNS}, talk(ASKED, SAID)),
    "conversations of a bot": (
        "conversations",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "bot", "value": "A"}]},
        talk(ASKED, SAID),
    ),
    "LLaVA without a mark": (
        "conversations",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "image": "a.png"},
        talk(WITH_IMAGE, SAID),
    ),
    "LLaVA without an image": (
        "conversations",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "A"}], "image": ""},
        talk(ASKED, SAID),
    ),
    "messages without images": ("messages", {"messages": TWO_TURNS, "images": ""}, talk(ASKED, SAID)),
    "messages as JSON text": ("openai", {"messages": json.dumps(TWO_TURNS)}, talk(ASKED, SAID)),
    "a bare list of messages": ("openai", TWO_TURNS, talk(ASKED, SAID)),
    "a developer and a model": (
        "openai",
        {"messages": [{"role": "developer", "content": "S"}, TWO_TURNS[0], {"role": "model", "content": "A"}]},
        talk(SYSTEM, ASKED, SAID),
    ),
    "parts of OpenAI's responses": (
        "openai",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Q"}],
                },
                {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
            ]
        },
        talk(WITH_IMAGE, SAID),
    ),
    "Anthropic": (
        "openai",
        {
            "system": "S",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/png", "data": PNG_BASE64},
                        },
                        {"type": "text", "text": "Q"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ],
        },
        talk(SYSTEM, ("user", [Image("bytes", PNG), Text("Q")]), SAID),
    ),
    "Gemini": (
        "gemini",
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
            "contents": [
                {
                    "role": "user",
                    "parts": [
                        {"inlineData": {"mimeType": "image/png", "data": PNG_BASE64}},
                        {"fileData": {"mimeType": "image/png", "fileUri": "file:///x/a.png"}},
                        {"text": "Q"},
                    ],
                },
                {"role": "model", "parts": [{"text": "A"}]},
            ],
        },
        talk(SYSTEM, ("user", [Image("bytes", PNG), Image("/x/a.png"), Text("Q")]), SAID),
    ),
    "the_cauldron": (
        "texts",
        {
            "images": ["a.png"],
            "texts": [{"user": "P", "assistant": "B", "source": "x"}, {"user": "Q", "assistant": "A", "source": "x"}],
        },
        talk(("user", [Image("a.png"), Text("P")]), EARLIER[1], ASKED, SAID),
    ),
    "XTuner": (
        "conversation",
        {"conversation": [{"system": "S", "input": "P", "output": "B"}, {"input": "Q", "output": "A"}]},
        talk(SYSTEM, *EARLIER, ASKED, SAID),
    ),
    "a turn for each speaker": ("conversations", {"conversations": [{"user": "Q"}, {"gpt": "A"}]}, talk(ASKED, SAID)),
    "speakers and texts": (
        "conversations",
        {"conversations": [{"speaker": "Human", "text": "Q"}, {"speaker": "AI", "text": "A"}]},
        talk(ASKED, SAID),
    ),
    "turns as columns": (
        "openai",
        {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}},
        talk(ASKED, SAID),
    ),
    "parts without a type": (
        "openai",
        {"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "Q"}]}, TWO_TURNS[1]]},
        talk(WITH_IMAGE, SAID),
    ),
    "a system text in parts": (
        "openai",
        {"system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}], "messages": TWO_TURNS},
        talk(SYSTEM, ASKED, SAID),
    ),
    "a caption": ("caption", {"prompt": "Q", "caption": "A", "image": "a.png"}, talk(WITH_IMAGE, SAID)),
    "a text of an image": ("caption", {"prompt": "Q", "text": "A", "image": "a.png"}, talk(WITH_IMAGE, SAID)),
    "PaliGemma and Florence": ("prefix", {"image": "a.png", "prefix": "Q", "suffix": "A"}, talk(WITH_IMAGE, SAID)),
    "images in numbered columns": (
        "question",
        {"question": "<image 1>Q", "answer": "A", "image_1": "a.png", "image_2": None, "image_3": None},
        talk(WITH_IMAGE, SAID),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_record_of_each_shape_becomes_its_conversation(name: str) -> None:
    shape, record, expected = SHAPES[name]
    before = json.dumps(record)
    found = read_record(record)
    assert found == expected
    assert found.shape == shape
    assert json.dumps(record) == before
    if isinstance(record, dict):
        assert read_record(record, shape) == expected


def test_every_shape_is_in_the_table_and_in_the_config() -> None:
    assert {shape for shape, _, _ in SHAPES.values()} == set(SHAPE_NAMES)
    assert set(RecordFormat.__args__) == {"auto", *SHAPE_NAMES}  # type: ignore[attr-defined]


def refusal(record: Any, record_format: str = "auto", image_mark: str | None = None) -> str:
    with pytest.raises(SampleError) as caught:
        read_record(record, record_format, frozenset(), image_mark)
    assert str(caught.value).isprintable()
    return str(caught.value)


FAULTS: dict[str, tuple[Any, str]] = {
    "a history that is no pairs": (
        {"query": "Q", "response": "A", "history": ["P"]},
        "must be a list of [question, reply]",
    ),
    "a history that is broken JSON": ({"query": "Q", "response": "A", "history": "[["}, "'history': not JSON"),
    "an answer that is a number": (
        {"question": "Q", "answer": 5},
        """if the number is meant, set `fields: {answer: "{answer}"}` of the source""",
    ),
    "an answer that is an object": (
        {"question": "Q", "answer": {"total": 5}},
        """if its JSON text is meant, set `fields: {answer: "{answer}"}` of the source""",
    ),
    "a turn that is an object": ({"messages": [TWO_TURNS[0], {"role": "assistant", "content": {"a": 1}}]}, "JSON text"),
    "several answers": (
        {"question": "Q", "answer": ["A", "B"]},
        "for the first, set `fields: {answer: answer.0}` of the source",
    ),
    "several questions": ({"question": ["Q", "R"], "answer": "A"}, "'question' has 2 texts"),
    "a text and images of a shard": ({"text": "A", "images": [{"bytes": b"x"}]}, "set `prompt` of the source"),
    "answers of VQA": ({"question": "Q", "answers": [{"answer": "A"}]}, "{answer: answers.0.answer}"),
    "a list of answers": ({"question": "Q", "answers": ["A", "B"]}, "{answer: answers.0}"),
    "a caption alone": ({"image": "a.png", "caption": "A"}, "set `prompt` of the source"),
    "other names of keys": ({"Question": "Q", " answer": "A"}, '{question: Question, answer: " answer"}'),
    "turns by another name": ({"dialog": TWO_TURNS}, "{conversations: dialog}"),
    "two tables of COCO": ({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}, "docs/data.md has a script"),
    "a preferred reply": ({"prompt": TWO_TURNS[:1], "chosen": TWO_TURNS[1:], "rejected": []}, "preference pairs"),
    "a mask": ({"messages": [TWO_TURNS[0], {**TWO_TURNS[1], "mask": 1}]}, "give the turn 'train': true or false"),
    "a turn without a role": ({"messages": [{"words": "Q"}]}, "turn 1 has 'words', expected 'role' and 'content'"),
    "columns by other names": (
        {"img": "a.png", "problem": "Q", "solution": "A"},
        "{image: img, question: problem, answer: solution}",
    ),
    "a reply by another name": (
        {"image": "a.png", "query": "Q", "label": ["A"]},
        "`fields: {response: label.0}` of the source, and `data.ignore_fields: [label]`",
    ),
    "the number of a class": ({"image": "a.png", "prompt": "Q", "label": 3}, '{completion: "{label}"}'),
    "a reply alone": ({"image": "a.png", "ground_truth": "A"}, "{caption: ground_truth}"),
    "an address of an image": ({"URL": "http://x/a", "TEXT": "A"}, "'URL' is the address of an image"),
    "an export of Label Studio": ({"data": {"image": "a.png"}, "annotations": [{"id": 1}]}, "as JSON-MIN"),
    "records by their names": ({"17": {"question": "Q"}, "18": {"question": "Q"}}, "if its values are the records"),
    "an image by another name": (
        {"question": "Q", "answer": "A", "image_path": "a.png"},
        "set `fields: {image: image_path}` of the source",
    ),
    "numbered images with a gap": ({"question": "Q", "answer": "A", "image_1": None, "image_2": "a.png"}, "have a gap"),
    "no values": ({"messages": None}, "found no keys with a value"),
    "an answer that is empty": ({"question": "Q", "answer": ""}, "an assistant turn without text"),
    "an input that is a number": ({"instruction": "Q", "input": 5, "output": "A"}, "'input' must be text"),
    "a rejected reply": ({"prompt": "Q", "completion": "A", "rejected": "B"}, "'rejected' is not understood"),
    "two replies": ({"instruction": "Q", "output": "A", "response": "B"}, "'response' is not understood"),
    "a system text twice": ({"query": "Q", "response": "A", "system": "S", "system_prompt": "T"}, "keep one"),
    "a switch that is not of a record": ({"query": "Q", "response": "A", "loss": 0}, "'loss' is not understood"),
    "an unknown part of Gemini's": (
        {"contents": [{"role": "user", "parts": [{"executableCode": {"code": "f"}}]}]},
        "a part of type",
    ),
    "an unknown part of Anthropic's": (
        {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use", "name": "f", "input": {}}]}]},
        "a part of type 'server_tool_use'",
    ),
    "an address": ({"question": "Q", "answer": "A", "image": "https://x/a.png"}, "nothing is fetched"),
    "images and no user": ({"messages": [TWO_TURNS[1]], "images": ["a.png"]}, "no turn of the user"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_understood_is_refused_by_name(name: str) -> None:
    record, words = FAULTS[name]
    assert words in refusal(record)


_NAMES = [
    *(key for shape in SHAPE_ROWS for key in shape.needs),
    "choices",
    "options",
    "images",
    "role",
    "content",
    "from",
    "value",
    "chosen",
    "label",
    "data",
    "url",
]
_NAMES += [
    "annotations",
    "annotation",
    "user",
    "a.b",
    "image_id",
    "image_1",
    "source",
    "bytes",
    "fields",
    "a {",
    "} b",
    "<image_0>",
    "\x85",
]
_NAMES += ["systemInstruction", "parts", "history", "image_url"]
_VALUES = ["Q", "a.png", "", None, 3, 1.5, True, "<image_0>", "http://x/a.jpg", "['a']", "[{}]", b"x", "user", "\ud800"]


def _nested(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(12) if depth else 0
    if kind < 5:
        return chance.choice(_VALUES)
    if kind < 8:
        return [_nested(chance, depth - 1) for _ in range(chance.randrange(3))]
    return {chance.choice(_NAMES): _nested(chance, depth - 1) for _ in range(chance.randrange(5))}


def test_any_record_is_read_or_refused_on_one_printable_line() -> None:
    num_refused = 0
    for seed in range(1000):
        chance = random.Random(seed)
        try:
            read_record({chance.choice(_NAMES): _nested(chance, 4) for _ in range(chance.randrange(7))})
        except SampleError as error:
            num_refused += 1
            message = str(error)
            assert message.isprintable(), seed
    assert num_refused > 900


def test_a_named_shape_must_be_there() -> None:
    refused = refusal({"instruction": "Q", "answer": "A"}, "alpaca")
    assert refused == "`format: alpaca` needs the keys 'instruction' and 'output' or 'instruction' and 'response'"


def test_replies_in_a_prompt_are_not_trained_on() -> None:
    """As in TRL, which trains on the completion alone."""
    found = read_record({"prompt": [*TWO_TURNS, TWO_TURNS[0]], "completion": "B"})
    assert [message.train for message in found.messages if message.role == "assistant"] == [False, True]


# --- images ---

IMAGES = {
    "a path": ("a/b.png", Image("a/b.png")),
    "an address of a file": ("file:///x/a.png", Image("/x/a.png")),
    "a data URI": (f"data:image/png;base64,{PNG_BASE64}", Image("data URI", PNG)),
    "base64": (PNG_BASE64, Image("base64", PNG)),
    "base64 in lines": (PNG_BASE64[:60] + "\n" + PNG_BASE64[60:], Image("base64", PNG)),
    "a long path that begins as base64 does": ("/9j/" + "a" * 60 + ".jpg", Image("/9j/" + "a" * 60 + ".jpg")),
    "bytes": (PNG, Image("bytes", PNG)),
    "bytes and no path": ({"bytes": PNG, "path": None}, Image("bytes", PNG)),
    "bytes and a path": ({"bytes": PNG, "path": "a.png"}, Image("a.png", PNG)),
    "a path and no bytes": ({"bytes": None, "path": "a.png"}, Image("a.png")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_given_in_many_ways(name: str) -> None:
    value, expected = IMAGES[name]
    for key, given in (("image", value), ("images", [value])):
        found = read_record({"question": "Q", "answer": "A", key: given})
        assert found.images == (expected,)
        assert [image.data for image in found.images] == [expected.data]


def test_a_path_in_a_reply_stays_text() -> None:
    found = read_record({"query": "Q", "response": "A <img>a.png</img>"})
    assert found == talk(ASKED, ("assistant", "A <img>a.png</img>"))


def test_images_can_be_a_list_in_JSON_text() -> None:
    found = read_record({"question": "Q", "answer": "A", "images": '["a.png", "b.png"]'})
    assert found.images == (Image("a.png"), Image("b.png"))


# --- marks ---


@pytest.mark.parametrize("mark", ["<image>", "<img>", "<IMG_CONTEXT>", "<|image|>", "[IMG]", "<ImageHere>"])
def test_a_mark_is_recognised(mark: str) -> None:
    record = {"query": f"one {mark} two\n{mark}\nthree", "response": "A", "images": ["a", "b"]}
    parts = [Text("one "), Image("a"), Text(" two"), Image("b"), Text("three")]
    found = read_record(record)
    assert found == talk(("user", parts), SAID)
    assert not found.has_unmarked_images
    assert read_record({"query": mark.replace("image>", "img>"), "response": "A"}).images == ()


def test_numbered_marks_are_in_order() -> None:
    def record(text: str) -> Any:
        return {"query": text, "response": "A", "images": ["a", "b"]}

    expected = talk(("user", [Image("a"), Text("or"), Image("b")]), SAID)
    assert read_record(record("<image_1>or<image_2>")) == expected
    assert "index '1', expected 0" in refusal(record("<image_2>or<image_1>"))
    assert "1 <image_1> mark but 2 images" in refusal(record("<image_1>or"))


def test_a_mark_can_be_named() -> None:
    record = {"query": "<pic>Q<image>", "response": "A", "images": ["a.png"]}
    assert read_record(record, image_mark="<pic>") == talk(("user", [Image("a.png"), Text("Q<image>")]), SAID)
    assert "0 <pic> marks" not in refusal({**record, "images": ["a", "b"]}, image_mark="<pic>")


def test_two_kinds_of_marks_are_refused() -> None:
    record = {"query": "[IMG] and <img>", "response": "A", "images": ["a"]}
    assert "set `image_mark`" in refusal(record)
    assert read_record(record, image_mark="[IMG]").images == (Image("a"),)


def test_marks_must_be_as_many_as_images() -> None:
    assert "1 <img> mark but 2 images" in refusal({"query": "<img>Q", "response": "A", "images": ["a", "b"]})


def test_what_says_where_its_images_are_is_remembered() -> None:
    row = {"question": "Q", "answer": "A", "image": "a"}
    assert read_record(row).has_unmarked_images
    assert not read_record({**row, "question": "<image>Q"}).has_unmarked_images
    assert not read_record({"question": "Q", "answer": "A"}).has_unmarked_images


# --- fields ---


def test_columns_are_mapped_to_keys() -> None:
    row = {"img": "a.png", "q": "Q", "a": "A", "s": "S", "id": 7}
    fields = {"image": "img", "question": "q", "answer": "a", "system": "s"}
    assert map_fields(row, fields) == {"image": "a.png", "question": "Q", "answer": "A", "system": "S", "id": 7}
    assert row["q"] == "Q"


def test_a_template_joins_columns() -> None:
    row = {"context": "C", "question": "Q", "n": 3, "none": None, "answer": "A"}
    fields = {"prompt": "{context}\n{question} {{{n}}}{none}", "completion": "answer"}
    assert map_fields(row, fields) == {"prompt": "C\nQ {3}", "completion": "A"}


@pytest.mark.parametrize(
    ("row", "fields", "words"),
    [
        ({"a": "A"}, {"answer": "b"}, "names the column 'b'"),
        ({"a": "A"}, {"answer": "{a}{b}"}, "names the column 'b'"),
        ({"a": "A", "answer": "B"}, {"answer": "a"}, "which the record has too"),
        ({"a": 1.5}, {"answer": "{a}"}, "text or a whole number, not '1.5'"),
        ({"a": "A"}, {"answer": "{a.upper}"}, "names the column 'a.upper'"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(row: Any, fields: dict[str, str], words: str) -> None:
    with pytest.raises(SampleError) as caught:
        map_fields(row, fields)
    assert words in str(caught.value)


# --- real files ---

REAL = {
    "ms_swift_tests/alpaca.jsonl": [
        talk(
            ("system", "system123"),
            ("user", "aaaaa"),
            ("assistant", "bbbbb"),
            ("user", "11111\n22222"),
            ("assistant", "33333"),
        ),
        talk(("user", "aaaaa"), ("assistant", "ccccc")),
        talk(("user", "AAAAA\nBBBBB"), ("assistant", "CCCCC")),
    ],
    "ms_swift_tests/sharegpt.jsonl": [
        talk(("system", "00000"), ("user", "11111"), ("assistant", "22222")),
        talk(("user", "aaaaa"), ("assistant", "bbbbb")),
        talk(
            ("user", "AAAAA"),
            ("assistant", "BBBBB"),
            ("user", "CCCCC"),
            ("assistant", "DDDDD"),
            ("user", "EEEEE"),
            ("assistant", "FFFFF"),
        ),
    ],
    "ms_swift_tests/swift_multi.json": [
        talk(("system", "00000"), ("user", "55555"), ("assistant", "66666")),
        talk(("user", "eeeee"), ("assistant", "fffff")),
        talk(
            ("user", "AAAAA"),
            ("assistant", "BBBBB"),
            ("user", "CCCCC"),
            ("assistant", "DDDDD"),
            ("user", "EEEEE"),
            ("assistant", "FFFFF"),
        ),
    ],
    "torchtune_tests/tests/assets/instruct_tiny.json": [
        talk(("user", "What time is it in London?"), ("assistant", "It is 10:00 AM in London")),
        talk(
            ("user", "Is is Istanbul or Constantinople?"),
            ("assistant", "Istanbul was Constantinople. Now it's Istanbul, not Constantinople."),
        ),
    ],
    "torchtune_tests/tests/assets/vqa_tiny.json": [
        talk(
            ("user", [Image("tests/assets/rgb_pytorch.png"), Text("What is presented on image?")]),
            ("assistant", "PyTorch logo."),
        )
    ],
}
REAL["ms_swift_tests/swift_single.jsonl"] = [
    talk(("system", "00000"), ("user", "11111"), ("assistant", "22222")),
    talk(("user", "aaaaa"), ("assistant", "bbbbb")),
    talk(("user", "AAAAA"), ("assistant", "BBBBB")),
]
REAL["ms_swift_tests/swift_multi.jsonl"] = REAL["ms_swift_tests/swift_multi.json"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize("file", REAL)
def test_a_published_file_of_each_shape_is_read(file: str) -> None:
    text = (SHARED / "chat_demos" / file).read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()] if file.endswith("jsonl") else json.loads(text)
    assert [read_record(record) for record in records] == REAL[file]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize(
    ("file", "shape", "num_records", "num_images", "num_unmarked"),
    [
        ("llava/playground/data/coco2014_val_gpt4_qa_30x3.jsonl", "alpaca", 90, 90, 90),
        ("xcomposer/data/multi_turn_multi_images_example.json", "conversations", 2, 4, 0),
        ("xcomposer/data/single_turn_single_image_example.json", "conversations", 2, 2, 2),
        ("xcomposer/data/only_text_example.json", "conversations", 2, 0, 0),
    ],
)
def test_a_real_file_of_longer_texts(
    file: str, shape: str, num_records: int, num_images: int, num_unmarked: int
) -> None:
    text = (SHARED / "chat_demos" / file).read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()] if file.endswith("jsonl") else json.loads(text)
    read = [read_record(record) for record in records]
    assert len(read) == num_records
    assert {conversation.shape for conversation in read} == {shape}
    assert sum(len(conversation.images) for conversation in read) == num_images
    assert sum(conversation.has_unmarked_images for conversation in read) == num_unmarked
    assert all("ImageHere" not in message.text for conversation in read for message in conversation.messages)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
def test_the_old_form_of_an_image_in_a_text_is_an_image() -> None:
    """In this file all of them are addresses of a server."""
    lines = (SHARED / "chat_demos/ms_swift_tests/multi_modal_1.jsonl").read_text(encoding="utf-8").splitlines()
    for record, num_images in zip(map(json.loads, lines), (1, 2, 0), strict=True):
        if num_images:
            assert "demo.jpeg' is not a local file: nothing is fetched" in refusal(record)
        assert read_record(record, "auto", frozenset({"</img>"})).images == ()
        local = json.loads(json.dumps(record).replace("https://qianwen-res.oss-cn-beijing.aliyuncs.com", "images"))
        assert read_record(local).images == (Image("images/Qwen-VL/assets/demo.jpeg"),) * num_images
