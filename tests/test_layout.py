"""What the layout makes of a chat template, and what it refuses: each check on a template that no other one refuses."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.encoding.calls import check_plain, length_without_end, shared_reply, shows_all
from mmtrain.encoding.layout import Layout
from mmtrain.encoding.skeleton import Offset, Piece, ReplyBounds, Skeleton
from mmtrain.encoding.template import ChatTemplate, TemplateTraits
from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text, ToolCall

END, EOT = "<end>", "<eot>"
Turn = tuple[str, list[Any]]
Render = Callable[[Any], str]


TOKENIZER = SimpleNamespace(
    traits=SimpleNamespace(special_tokens=re.compile("<end>|<eot>|<image>"), eos_ids=frozenset({1})),
    id_of=lambda token: {END: 1, EOT: 2}[token],
)
"""`<end>` and `<eot>` are special tokens, and only `<end>` stops generation."""


def template(render: Render, prompt: str, image_token: str | None) -> ChatTemplate:
    """A chat template in Python."""

    def make_text(messages: Any, begun: bool, tools: Any = None) -> str:
        return render(messages) + (prompt if begun else "")

    return ChatTemplate("", TemplateTraits(frozenset(), True, prompt), make_text, image_token)


def words(message: Any) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])


def plain(messages: Any) -> str:
    return "".join(f"{message['role']}:{words(message)}{END}\n" for message in messages)


def lay_out(
    render: Render, *turns: Turn, prompt: str = "assistant:", image_token: str | None = "<image>"
) -> tuple[list[Piece], Skeleton]:
    messages = []
    for role, parts in turns:
        content = tuple(part if isinstance(part, Image) else Text(part) for part in parts)
        messages.append(Message(role, content))  # type: ignore[arg-type]
    made: Any = SimpleNamespace(tokenizer=TOKENIZER, template=template(render, prompt, image_token))
    layout, conversation = Layout(made), Conversation(tuple(messages))
    return layout.lay_out(conversation, layout.form(conversation))


IMAGE = Image("0.png")
ONE: list[Turn] = [("user", ["what?"]), ("assistant", ["dog"])]
TWO: list[Turn] = [*ONE, ("user", ["so"]), ("assistant", ["no"])]


def test_pieces_and_bounds_of_replies_of_a_plain_template() -> None:
    turns: list[Turn] = [("user", ["see ", IMAGE, "it"]), ("assistant", ["a ", "dog"]), ("user", [IMAGE, "so"])]
    pieces, skeleton = lay_out(plain, *turns, ("assistant", ["no"]))
    assert pieces == [
        Piece("template", "user:", 0),
        Piece("text", "see ", 0),
        Piece("image", "<image>", 0),
        Piece("text", "it", 0),
        Piece("template", "<end>\nassistant:", 0),
        Piece("text", "a ", 1),
        Piece("text", "dog", 1),
        Piece("template", "<end>\nuser:", 1),
        Piece("image", "<image>", 2),
        Piece("text", "so", 2),
        Piece("template", "<end>\nassistant:", 2),
        Piece("text", "no", 3),
        Piece("template", "<end>\n", 3),
    ]
    assert skeleton.replies == {
        1: ReplyBounds(border=Offset(5, 0), last_piece=6, end=Offset(7, 5), other_end=False),
        3: ReplyBounds(border=Offset(11, 0), last_piece=11, end=Offset(12, 5), other_end=False),
    }


def test_a_reply_begins_where_the_prompt_ends() -> None:
    """Here one character before its text: the model writes the space."""
    _, skeleton = lay_out(lambda messages: plain(messages).replace("assistant:", "assistant: "), *ONE)
    border = Offset(2, len("<end>\nassistant:"))
    assert skeleton.replies == {1: ReplyBounds(border, last_piece=3, end=Offset(4, 5), other_end=False)}


def test_a_reply_without_a_prompt_is_not_trained_on() -> None:
    _, skeleton = lay_out(plain, ("assistant", ["hello"]), *TWO[2:])
    assert list(skeleton.replies) == [2]


def test_a_reply_that_is_rewritten_once_others_follow_is_not_trained_on_in_the_whole() -> None:
    """Only the last one is begun as the generation prompt begins it."""

    def marks_the_last(messages: Any) -> str:
        *before, last = (f"{message['role']}:{words(message)}{END}\n" for message in messages)
        return "".join(before) + last.replace("assistant:", "assistant!:")

    _, skeleton = lay_out(marks_the_last, *TWO, prompt="assistant!:")
    assert list(skeleton.replies) == [3]


@pytest.mark.parametrize(
    ("others_follow", "last", "length", "other_end"),
    [
        (END, END, 5, False),
        ("", "", None, False),
        ("\n", "\n", None, False),
        (" " + END, " " + END, 6, False),
        (EOT, EOT, 5, False),  # none stops generation: the first one
        (EOT + EOT, EOT + EOT, 5, False),
        (EOT + END, EOT + END, 10, False),  # the one that stops
        (END + EOT, END + EOT, 5, False),
        (EOT, END, None, True),  # ended by another token than the last reply, which does not stop generation
        (END, EOT, 5, False),
        (EOT + END, EOT * 2, 5, False),
        (EOT, "", None, False),
        ("", END, None, False),
    ],
)
def test_where_a_reply_ends(others_follow: str, last: str, length: int | None, other_end: bool) -> None:
    def render(messages: Any) -> str:
        text = ""
        for number, message in enumerate(messages, start=1):
            closing = last if number == len(messages) else f"{others_follow}\n"
            text += f"{message['role']}:{words(message)}{closing if message['role'] == 'assistant' else '|'}"
        return text

    _, skeleton = lay_out(render, *TWO)
    first = skeleton.replies[1]
    assert (first.last_piece, first.end, first.other_end) == (3, None if length is None else (4, length), other_end)


@pytest.mark.parametrize("reply", ["dog", " dog", "dog ", " dog "])
@pytest.mark.parametrize("after", ["", " "])
def test_text_that_the_template_trims_is_trained_on_without_its_spaces(reply: str, after: str) -> None:
    """A space that the template writes after it does not belong to it."""

    def trims(messages: Any) -> str:
        return "".join(f"{message['role']}:{words(message).strip()}{after}{END}\n" for message in messages)

    pieces, _ = lay_out(trims, ("user", ["what?"]), ("assistant", [reply]))
    assert pieces[3:] == [Piece("text", "dog", 1), Piece("template", f"{after}{END}\n", 1)]


def test_a_mark_of_an_image_is_plain_text_to_a_model_without_images() -> None:
    pieces, _ = lay_out(lambda messages: f"<image>{plain(messages)}", *ONE, image_token=None)
    assert pieces[0] == Piece("template", "<image>user:", 0)


def counts_letters(messages: Any) -> str:
    """The text around the words depends on them, and its length does not."""
    return "".join(f"{message['role']}{len(words(message))}:{words(message)}{END}\n" for message in messages)


REFUSED: dict[str, tuple[Render, list[Turn], str]] = {
    "a word replaced by another": (
        lambda messages: plain(messages).replace("dog", "cat"),
        ONE,
        r"changes the text 'dog'",
    ),
    "its own text changed": (
        counts_letters,
        [("user", ["what? it"]), ONE[1]],
        r"rewrites the conversation near 'user8:",
    ),
    "text added at the end": (
        lambda messages: plain(messages) + "!" * plain(messages).count("dog"),
        ONE,
        r"adds '!' to the conversation",
    ),
    "a turn left out": (
        lambda messages: plain(message for message in messages if message["role"] != "system"),
        [("system", ["be brief"]), *ONE],
        r"does not show every text of the conversation exactly once",
    ),
    "a turn repeated": (
        lambda messages: plain(messages[:1]) + plain(messages),
        ONE,
        r"does not show every text of the conversation exactly once",
    ),
    "an image left out": (
        lambda messages: plain(messages).replace("<image>", ""),
        [("user", [IMAGE, "what?"]), ONE[1]],
        r"writes 0 placeholders for 1 image",
    ),
    "an image repeated": (
        lambda messages: plain(messages).replace("<image>", "<image><image>"),
        [("user", [IMAGE, "what?"]), ONE[1]],
        r"writes 2 placeholders for 1 image",
    ),
    "a placeholder without an image": (lambda messages: f"<image>{plain(messages)}", ONE, r"1 placeholders for 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_changes_the_conversation_is_refused(name: str) -> None:
    render, turns, reason = REFUSED[name]
    with pytest.raises(SampleError, match=reason):
        lay_out(render, *turns)


def test_a_prompt_that_reaches_into_the_reply_is_refused() -> None:
    """It ends in `Zq`, with which every stand-in for words begins."""
    with pytest.raises(SampleError, match="writes text of the reply into its prompt"):
        lay_out(plain, *ONE, prompt="assistant:Zq")


@pytest.mark.parametrize(
    ("reply", "length"),
    [
        ("dog", 3),
        ("dog \n", 3),
        ("dog<end>\n", 3),
        ("dog<eot>", 3),
        ("dog<eot><end>", 8),  # the first that stops generation
        ("dog<end><eot>", 3),
        ("dog<end><end>", 3),
        ("dog<eot><eot>", 8),  # none stops: the last
        ("dog<end>x<end>", 9),
        ("<end>dog", 8),
        ("", 0),
    ],
)
def test_a_reply_with_calls_is_all_before_the_token_that_ends_it(reply: str, length: int) -> None:
    assert length_without_end(reply, TOKENIZER) == length  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("whole", "closing", "reply"),
    [
        ("Q:call<end>Q:", "Q:call<end>", "call<end>"),
        ("Q:call<end>Q:", "Q:(no thought)call<end>", "call<end>"),
        ("Q:call<end>Q:", "Q:call<eot>", ""),
        ("call<end>Q:call<end>", "call<end>Q:call<end>", "all<end>Q:call<end>"),  # from the end of the prompt on
    ],
)
def test_a_reply_that_others_follow_is_what_both_texts_have(whole: str, closing: str, reply: str) -> None:
    assert shared_reply(whole, closing, 2 if whole.startswith("Q") else 1) == reply


def test_every_call_is_shown_as_often_as_it_is_made() -> None:
    calls = [ToolCall(name, "{}") for name in ("look", "see", "look")]
    assert shows_all("look see look", calls)
    assert not shows_all("look see", calls)
    assert not shows_all("look look", calls)
    assert shows_all("", [])


def test_a_special_token_in_a_call_is_refused() -> None:
    check_plain(["look", "{}"], TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(SampleError, match=r"^'<eot>' in a tool or a call is a special token of the model: remove it$"):
        check_plain(["look", "a<eot>"], TOKENIZER)  # type: ignore[arg-type]
