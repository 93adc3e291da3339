"""Tools, calls and results: what records give, what templates make of it, and what is trained on.

References are transformers' `apply_chat_template(messages, tools=tools)`, and by hand what a model must write for a
call.
"""

import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mmtrain.checks.findings import IGNORED, NO_END, OUTSIDE, REPLY
from mmtrain.checks.labels import Checker
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.generate.prompts import prompt_for
from mmtrain.records.chat import Conversation, Message, SampleError, Text, ToolCall
from mmtrain.records.formats import read_record
from support.builders import SHARED
from support.label_models import TEMPLATES, make_directory
from support.tool_templates import TOOL_TEMPLATES

FUNCTION = {
    "name": "f",
    "description": "Finds ä.",
    "parameters": {"type": "object", "properties": {"a": {"type": "int"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}, "id": "abcdefgh1"}
RESULT = {"role": "tool", "content": "It is 5.", "tool_call_id": "abcdefgh1"}
RECORD: dict[str, Any] = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        RESULT,
        {"role": "assistant", "content": "Done."},
    ],
}
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "deepseek": "</s>", "tags": "<end_of_turn>"}


# --- records ---

ASKED = Message("user", (Text("Q"),))
SAID = Message("assistant", (Text("A"),))
TOOLS = (json.dumps(TOOL, ensure_ascii=False),)


def called(*calls: ToolCall, text: str = "") -> Message:
    return Message("assistant", (Text(text),) if text else (), calls=calls)


def given(text: str, name: str | None = None, call_id: str | None = None) -> Message:
    return Message("tool", (Text(text),), name=name, call_id=call_id)


F = ToolCall("f", '{"a": 1}')
G = ToolCall("g", "{}")
Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
ONE = {"name": "f", "arguments": {"a": 1}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}

SHAPES: dict[str, tuple[Any, Conversation]] = {
    "OpenAI": (
        {**RECORD, "messages": [*RECORD["messages"][:3], A]},
        Conversation(
            (ASKED, called(replace(F, id="abcdefgh1")), given("It is 5.", call_id="abcdefgh1"), SAID), tools=TOOLS
        ),
    ),
    "arguments as an object, two calls, words": (
        {"messages": [Q, {**A, "tool_calls": [ONE, {"function": {"name": "g"}}]}]},
        Conversation((ASKED, called(F, G, text="A"))),
    ),
    "JSON text everywhere, as in tables": (
        {
            "tools": json.dumps([TOOL], ensure_ascii=False),
            "messages": json.dumps([Q, {"role": "assistant", "content": "", "tool_calls": json.dumps([ONE])}]),
        },
        Conversation((ASKED, called(F)), tools=TOOLS),
    ),
    "functions, as OpenAI had them first": (
        {
            "functions": [FUNCTION],
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
                {"role": "function", "name": "f", "content": "5"},
                A,
            ],
        },
        Conversation((ASKED, called(F), given("5", "f"), SAID), tools=TOOLS),
    ),
    "ShareGPT": (
        {
            "tools": json.dumps([FUNCTION]),
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": json.dumps(ONE)},
                {"from": "observation", "value": '{"x": 5}'},
                {"from": "gpt", "value": "A"},
            ],
        },
        Conversation((ASKED, called(F), given('{"x": 5}'), SAID), tools=TOOLS),
    ),
    "ms-swift, calls of one turn one after the other": (
        {
            "messages": [
                Q,
                A,
                {"role": "tool_call", "content": json.dumps(ONE)},
                {"role": "tool_call", "content": '{"name": "g", "arguments": {}}'},
                {"role": "tool_response", "content": "5"},
                {"role": "tool", "content": {"x": "ä"}},
                A,
            ]
        },
        Conversation((ASKED, called(F, G, text="A"), given("5"), given('{"x": "ä"}'), SAID)),
    ),
    "LLaMA-Factory, a part that is a call": (
        {"messages": [Q, {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(ONE)}]}]},
        Conversation((ASKED, called(F))),
    ),
    "Gemma, responses in the turn that calls": (
        {"messages": [Q, {**A, "tool_calls": [ONE], "tool_responses": [{"name": "f", "response": {"x": 5}}]}, A]},
        Conversation((ASKED, called(F, text="A"), given('{"x": 5}', "f"), SAID)),
    ),
    "Anthropic, calls and results in parts": (
        {
            "tools": [{"name": "f", "description": "Finds ä.", "input_schema": FUNCTION["parameters"]}],
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "A"}, USE, {**USE, "id": "t2", "name": "g", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "5", "is_error": False},
                        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "6"}]},
                        {"type": "text", "text": "Q"},
                    ],
                },
                A,
            ],
        },
        Conversation(
            (
                ASKED,
                called(replace(F, id="t1"), replace(G, id="t2"), text="A"),
                given("5", call_id="t1"),
                given("6", call_id="t2"),
                ASKED,
                SAID,
            ),
            tools=TOOLS,
        ),
    ),
    "Gemini, calls and results in parts": (
        {
            "tools": [{"functionDeclarations": [FUNCTION]}],
            "contents": [
                {"role": "user", "parts": [{"text": "Q"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"x": "ä"}}}]},
                {"role": "model", "parts": [{"text": "A"}]},
            ],
        },
        Conversation((ASKED, called(F), given('{"x": "ä"}', "f"), SAID), tools=TOOLS),
    ),
    "responses in a turn of their own": (
        {"messages": [Q, {**A, "tool_calls": [ONE]}, {"role": "tool", "tool_responses": [{"content": "5"}]}, A]},
        Conversation((ASKED, called(F, text="A"), given("5"), SAID)),
    ),
    "reasoning": (
        {"messages": [Q, {**A, "reasoning_content": "hm"}]},
        Conversation((ASKED, replace(SAID, reasoning="hm"))),
    ),
    "thinking": ({"messages": [Q, {**A, "thinking": "hm"}]}, Conversation((ASKED, replace(SAID, reasoning="hm")))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tools_of_each_shape_become_the_conversation(name: str) -> None:
    record, expected = SHAPES[name]
    before = json.dumps(record)
    assert read_record(record) == expected
    assert json.dumps(record) == before


FAULTS: dict[str, tuple[Any, str]] = {
    "a call without a name": ({"messages": [Q, {**A, "tool_calls": [{"arguments": {}}]}]}, "a call must be an object"),
    "arguments that are no JSON": (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
        "'the arguments of f': not JSON",
    ),
    "arguments that are a list": (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "the arguments of 'f' must be an object",
    ),
    "arguments with half a character": (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}]},
        "cannot be written as JSON",
    ),
    "a key of a call": ({"messages": [Q, {**A, "tool_calls": [{**ONE, "x": 1}]}]}, "'x' is not understood"),
    "calls that are no list": ({"messages": [Q, {**A, "tool_calls": {"name": "f"}}]}, "'tool_calls' must be a list"),
    "calls given twice": (
        {"messages": [Q, {**A, "tool_calls": [ONE], "function_call": ONE}]},
        "gives its calls twice",
    ),
    "a call of the user": ({"messages": [{**Q, "tool_calls": [ONE]}, A]}, "calls in a turn of the user"),
    "reasoning of the user": ({"messages": [{**Q, "thinking": "hm"}, A]}, "reasoning in a turn of the user"),
    "reasoning given twice": ({"messages": [Q, {**A, "thinking": "a", "reasoning": "b"}]}, "keep one"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}], "messages": [Q, A]}, "a tool must be"),
    "tools that are no list": ({"tools": {"name": "f"}, "messages": [Q, A]}, "'tools' must be a list"),
    "tools given twice": ({"tools": [TOOL], "functions": [TOOL], "messages": [Q, A]}, "keep one"),
    "a tool with two schemas": (
        {"tools": [{"name": "f", "input_schema": {}, "parameters": {}}], "messages": [Q, A]},
        "both 'input_schema' and 'parameters'",
    ),
    "words after a call": (
        {"messages": [Q, {"role": "assistant", "content": [USE, {"type": "text", "text": "A"}]}]},
        "a turn has more after its calls",
    ),
    "a key of a call of Anthropic's": (
        {"messages": [Q, {"role": "assistant", "content": [{**USE, "x": 1}]}]},
        "'x' is not understood",
    ),
    "a result that is an error": (
        {"messages": [Q, A, {"role": "user", "content": [{"type": "tool_result", "content": "5", "is_error": True}]}]},
        "'is_error' is not understood",
    ),
    "a result of the assistant": (
        {"messages": [Q, {"role": "assistant", "content": [{"type": "tool_result", "content": "5"}]}]},
        "the result of a call in a turn of the 'assistant'",
    ),
    "a call of Gemini's by the user": (
        {"contents": [{"role": "user", "parts": [{"functionCall": {"name": "f"}}]}]},
        "calls in a turn of the user",
    ),
    "a key of a call of Gemini's": (
        {"contents": [{"role": "model", "parts": [{"functionCall": {"name": "f", "x": 1}}]}]},
        "'x' is not understood",
    ),
    "a result without content": ({"messages": [Q, A, {"role": "tool"}, A]}, "'content' must be text"),
    "a result to be trained on": ({"messages": [Q, A, {**RESULT, "train": True}, A]}, "only the assistant's turns"),
    "a call that says otherwise than its turn": (
        {"messages": [Q, A, {"role": "tool_call", "content": json.dumps(ONE), "train": False}]},
        "say different things",
    ),
    "a response that is none": ({"messages": [Q, {**A, "tool_responses": ["x"]}]}, "one of 'tool_responses'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tools_that_are_not_understood_are_refused_with_the_reason(name: str) -> None:
    record, words = FAULTS[name]
    with pytest.raises(SampleError) as caught:
        read_record(record)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


# --- encoding ---


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tools")
    made = {
        name: make_directory(folder / name, "byte_level_split", one.text, more_specials=one.specials)
        for name, one in TOOL_TEMPLATES.items()
    }
    return made | {"chatml": make_directory(folder / "chatml", "byte_level", TEMPLATES["chatml"].text)}


@cache
def processor_of(directory: Path) -> ChatProcessor:
    return load_processor(str(directory))


def reference(directory: Path, name: str, record: Any) -> list[int]:
    """The ids of transformers, given the messages in the form that the template takes, written by hand."""
    messages = []
    for message in record["messages"]:
        message = {**message}
        if calls := message.get("tool_calls"):
            if name != "deepseek":
                calls = [
                    {**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
                    for c in calls
                ]
            message |= {"tool_calls": calls, "content": message["content"] or ""}
        if name == "tags":
            message["content"] = [{"type": "text", "text": message["content"]}] if message["content"] else []
        messages.append(message)
    tools = record.get("tools")
    return list(AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, tools=tools, return_dict=False))


def trained_texts(processor: ChatProcessor, encoded: Encoded) -> list[str]:
    flags = [False, *encoded.supervised.tolist(), False]
    borders = [i for i, (one, two) in enumerate(pairwise(flags)) if one != two]
    return [
        processor.tokenizer.decode(encoded.ids[a:b].tolist()) for a, b in zip(borders[::2], borders[1::2], strict=True)
    ]


def for_template(name: str, record: Any = RECORD) -> Any:
    """The record without what the template has no place for."""
    return record if TOOL_TEMPLATES[name].shows_tools else {k: v for k, v in record.items() if k != "tools"}


def faults(
    processor: ChatProcessor,
    encoded: Encoded,
    supervised: list[bool],
    conversation: Conversation,
    train_on: str = "assistant",
) -> list[str]:
    labels = np.where(supervised, encoded.ids, IGNORED)
    return [
        one.kind for one in Checker(processor, train_on).check(encoded.ids, labels, conversation, ()) if one.is_fault
    ]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_calls_are_trained_on_and_results_are_not(directories: dict[str, Path], name: str) -> None:
    record, processor = for_template(name), processor_of(directories[name])
    conversation = read_record(record)
    encoded = Encoder(processor).encode(conversation, Path())
    assert encoded.ids.tolist() == reference(directories[name], name, record)
    before = {"qwen3": "<think>\n\n</think>\n\n", "mistral": " "}.get(name, "")
    end = ENDS.get(name, "<|im_end|>")
    assert trained_texts(processor, encoded) == [TOOL_TEMPLATES[name].called, f"{before}Done.{end}"]
    assert faults(processor, encoded, encoded.supervised.tolist(), conversation) == []
    prompt = prompt_for(Encoder(processor), Conversation(conversation.messages[:3], tools=conversation.tools), Path())
    assert encoded.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()


def with_turns(*turns: Any) -> Any:
    return {"tools": [TOOL], "messages": [{"role": "user", "content": "Q"}, *turns]}


TWO_CALLS = {
    "role": "assistant",
    "content": "Wait.",
    "tool_calls": [CALL, {**CALL, "function": {"name": "g", "arguments": '{"b": "x\\"y"}'}}],
}
AGAIN = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TWO = [RESULT, {**RESULT, "content": "7"}]


def test_several_calls_follow_the_text_of_their_turn(directories: dict[str, Path]) -> None:
    record = with_turns(TWO_CALLS, *TWO, {"role": "assistant", "content": "Done."}, *AGAIN)
    processor = processor_of(directories["qwen2.5"])
    encoded = Encoder(processor).encode(read_record(record), Path())
    assert encoded.ids.tolist() == reference(directories["qwen2.5"], "qwen2.5", record)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert trained_texts(processor, encoded) == [
        f'Wait.\n{call}\n<tool_call>\n{{"name": "g", "arguments": {{"b": "x\\"y"}}}}\n</tool_call><|im_end|>',
        "Done.<|im_end|>",
        f"{call}<|im_end|>",
    ]
    assert faults(processor, encoded, encoded.supervised.tolist(), read_record(record)) == []


def test_a_call_that_is_not_to_be_trained_on_is_context(directories: dict[str, Path]) -> None:
    record = with_turns({**TWO_CALLS, "train": False}, *TWO, {"role": "assistant", "content": "Done."}, *AGAIN)
    processor = processor_of(directories["qwen2.5"])
    encoded = Encoder(processor, train_on="last").encode(read_record(record), Path())
    assert [text[:11] for text in trained_texts(processor, encoded)] == ["<tool_call>"]
    encoded = Encoder(processor).encode(read_record(record), Path())
    assert [text[:5] for text in trained_texts(processor, encoded)] == ["Done.", "<tool"]


def test_a_call_without_its_end_is_trained_on_up_to_there(directories: dict[str, Path]) -> None:
    processor = processor_of(directories["qwen2.5"])
    encoded = Encoder(processor, end_of_turn=False).encode(read_record(RECORD), Path())
    assert trained_texts(processor, encoded)[0] == TOOL_TEMPLATES["qwen2.5"].called.removesuffix("<|im_end|>")


def test_the_checks_find_calls_that_are_labelled_wrongly(directories: dict[str, Path]) -> None:
    processor, conversation = processor_of(directories["qwen2.5"]), read_record(RECORD)
    encoded = Encoder(processor).encode(conversation, Path())
    right = encoded.supervised.tolist()
    first = right.index(True)
    end = right.index(False, first)
    assert REPLY in faults(processor, encoded, [*right[: end - 2], False, *right[end - 1 :]], conversation)
    assert NO_END in faults(processor, encoded, [*right[: end - 1], False, *right[end:]], conversation)
    late = [*right[:first], False, *right[first + 1 :]]
    assert set(faults(processor, encoded, late, conversation)) & {REPLY, OUTSIDE}
    result = [*right[: end + 12], *[True] * 3, *right[end + 15 :]]
    assert OUTSIDE in faults(processor, encoded, result, conversation)


def test_a_result_that_the_template_writes_as_json(directories: dict[str, Path]) -> None:
    record = with_turns(AGAIN[1], {**RESULT, "content": 'It\n"is" ä'}, {"role": "assistant", "content": "Done."})
    processor = processor_of(directories["llama3"])
    encoded = Encoder(processor).encode(read_record(record), Path())
    assert encoded.ids.tolist() == reference(directories["llama3"], "llama3", record)
    assert r'"It\n\"is\" ä"' in processor.tokenizer.decode(encoded.ids.tolist())


REASONED = {"role": "assistant", "content": "Done.", "reasoning_content": "I look.\n"}


def test_the_reasoning_of_a_reply_is_trained_on_where_the_template_shows_it(directories: dict[str, Path]) -> None:
    record = with_turns({**TWO_CALLS, "reasoning_content": "Both?"}, *TWO, REASONED)
    processor = processor_of(directories["qwen3"])
    encoded = Encoder(processor).encode(read_record(record), Path())
    assert encoded.ids.tolist() == reference(directories["qwen3"], "qwen3", record)
    first, last = trained_texts(processor, encoded)
    assert first.startswith("<think>\nBoth?\n</think>\n\nWait.\n<tool_call>")
    assert last == "<think>\nI look.\n</think>\n\nDone.<|im_end|>"
    assert faults(processor, encoded, encoded.supervised.tolist(), read_record(record)) == []


def test_reasoning_that_the_template_leaves_out_of_earlier_turns_is_not_trained_on(
    directories: dict[str, Path],
) -> None:
    record = with_turns(REASONED, *AGAIN)
    processor = processor_of(directories["qwen3"])
    encoded = Encoder(processor, train_on="last").encode(read_record(record), Path())
    assert encoded.ids.tolist() == reference(directories["qwen3"], "qwen3", record)
    sequences = [one for _, one in Encoder(processor).sequences(read_record(record))]
    ids = [Encoder(processor).encode(one, Path()).ids.tolist() for one in sequences]
    assert len(ids) == 2
    assert ids[1] == encoded.ids.tolist()
    assert ids[0] == reference(directories["qwen3"], "qwen3", {**record, "messages": record["messages"][:2]})


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("chatml", {"tools": [TOOL], "messages": [Q, A]}, "has no place for tools"),
        ("chatml", {"messages": RECORD["messages"]}, "does not show the calls of tools"),
        ("chatml", {"messages": [Q, {**A, "reasoning_content": "hm"}]}, "does not show the reasoning of a reply"),
        ("tags", RECORD, "has no place for tools"),
        ("llama3", with_turns(TWO_CALLS, *TWO, A), "refuses the conversation: only single tool-calls at once"),
        ("mistral", with_turns({**A, "tool_calls": [ONE]}, RESULT, A), "ids must have 9 characters"),
        ("qwen2.5", with_turns({**A, "tool_calls": [{"name": "<|im_end|>"}]}), "'<|im_end|>' in a tool or a call"),
        ("qwen2.5", {"tools": [{"name": "f", "x": "</s>"}], "messages": [Q, A]}, "'</s>' in a tool or a call"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(
    directories: dict[str, Path], name: str, record: Any, words: str
) -> None:
    with pytest.raises(SampleError) as caught:
        Encoder(processor_of(directories[name])).encode(read_record(record), Path())
    assert words in str(caught.value)


def test_a_result_next_to_calls_in_text_needs_no_place_for_calls(directories: dict[str, Path]) -> None:
    processor = processor_of(directories["chatml"])
    encoded = Encoder(processor).encode(read_record({"messages": [Q, A, {"role": "tool", "content": "5"}, A]}), Path())
    assert trained_texts(processor, encoded) == ["A<|im_end|>"] * 2
    assert "<|im_start|>tool\n5<|im_end|>" in processor.tokenizer.decode(encoded.ids.tolist())


def test_a_real_tokenizer_and_template(tmp_path: Path) -> None:
    """minimind-v, whose template is in the manner of Qwen3's and gives every reply a thought."""
    source = SHARED / "models" / "minimind-v_tiny_tokenizer"
    if not source.exists():
        pytest.skip("needs ../shared/data")
    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama", "vocab_size": 6400}')
    processor = load_processor(str(tmp_path / "m"))
    record = with_turns({**TWO_CALLS, "reasoning_content": "Both?"}, *TWO, REASONED, *AGAIN)
    encoded = Encoder(processor, train_on="last").encode(read_record(record), Path())
    assert encoded.ids.tolist() == reference(tmp_path / "m", "minimind", record)
    (text,) = trained_texts(processor, encoded)
    assert text.endswith(TOOL_TEMPLATES["qwen3"].called)
    assert faults(processor, encoded, encoded.supervised.tolist(), read_record(record), "last") == []
