"""A conversation laid out as text by the model's own chat template, with every word's place known.

Nothing is searched for in the finished text. The conversation is rendered twice: once with each text replaced by a
unique stand-in, which shows what the template writes around the words, and once as it is. Words put into the first
must give the second, character for character; otherwise the template rewrites the words, and the sample is refused.
The first rendering depends only on the form of the conversation (roles, kinds of parts, tools and calls) and is kept.
Tools and calls are in it as they are; where a call lies is found by `encoding/calls.py`.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmtrain.encoding.calls import check_plain, length_without_end, shared_reply, shows_all
from mmtrain.encoding.messages import as_messages, as_tools
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, Image, Message, Part, Role, SampleError, Text, ToolCall
from mmtrain.safe_text import shown

Kind = Literal["template", "words", "calls", "image"]


class TurnForm(NamedTuple):
    """What the template's own text depends on in a turn."""

    role: Role
    kinds: tuple[str, ...]
    """`text` or `image` for each part, after `reasoning` if the turn has some."""
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None


class Form(NamedTuple):
    """What the template's own text depends on."""

    turns: tuple[TurnForm, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the rendered text: the template's own, words or calls of a turn, or the placeholder of an image."""

    kind: Kind
    text: str
    turn: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Where an assistant's turn lies in the pieces of a skeleton.

    `border`: (piece, character) at which inference's prompt ends; what follows is the model's to write.
    `end`: (piece, character) after the token that ends the turn; None where the template writes none.
    `other_end`: the template ends a reply that others follow by another token, which does not stop generation: nothing
    of its end is trained on there, and nothing is put in its place.
    """

    border: tuple[int, int]
    words_end: int
    end: tuple[int, int] | None
    other_end: bool


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """What the template writes for a form of conversation; the text of a words piece is its number, not words."""

    pieces: tuple[Piece, ...]
    answers: dict[int, Answer]


class Layout:
    """Lays conversations out by one model's template."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self.skeleton = functools.lru_cache(maxsize=4096)(self._skeleton)

    def lay_out(self, conversation: Conversation) -> tuple[list[Piece], Skeleton]:
        """The pieces of the rendered text and the skeleton they follow.

        Raises SampleError where the template refuses the conversation or rewrites its words.
        """
        skeleton = self.skeleton(_form(conversation))
        whole = self._processor.template.render(as_messages(conversation.messages), tools=as_tools(conversation))
        words = list(_words(conversation))
        pieces, at = [], 0
        for i, piece in enumerate(skeleton.pieces):
            text = piece.text
            if piece.kind == "words":
                following = skeleton.pieces[i + 1].text if i + 1 < len(skeleton.pieces) else ""
                if i + 1 < len(skeleton.pieces) and skeleton.pieces[i + 1].kind == "words":
                    following = ""
                text = _as_rendered(words[int(piece.text)], following, whole, at)
            if not whole.startswith(text, at):
                raise SampleError(
                    f"the model's chat template rewrites the conversation near {shown(whole[at : at + 40])}"
                )
            pieces.append(Piece(piece.kind, text, piece.turn))
            at += len(text)
        if at != len(whole):
            raise SampleError(f"the model's chat template adds {shown(whole[at : at + 40])} to the conversation")
        return pieces, skeleton

    def _skeleton(self, form: Form) -> Skeleton:
        conversation = _stand_ins(form)
        messages, tools = as_messages(conversation.messages), as_tools(conversation)
        render = functools.partial(self._processor.template.render, tools=tools)
        self._check_tools(form, whole := render(messages), self._processor.template.render(messages))
        pieces = self._split(whole, form)
        replies: dict[int, tuple[int, str]] = {}
        for turn, of_turn in enumerate(form.turns):
            if of_turn.role != "assistant" or turn == 0:
                continue  # without a turn before it there is no prompt
            prompt = render(messages[:turn], add_generation_prompt=True)
            closing = render(messages[: turn + 1])
            if not whole.startswith(prompt):
                continue  # the template rewrites earlier turns: this one cannot be trained on in the whole
            if of_turn.calls:
                closing = shared_reply(whole, closing, len(prompt))
                if not shows_all(closing, of_turn.calls):
                    continue
                pieces = self._with_calls(pieces, turn, len(prompt), closing)
            replies[turn] = len(prompt), closing
        answers = {
            turn: self._answer(pieces, turn, *reply)
            for turn, reply in replies.items()
            if _is_whole(form.turns[turn], [piece.kind for piece in pieces if piece.turn == turn])
        }
        return Skeleton(tuple(pieces), answers)

    def _check_tools(self, form: Form, with_tools: str, without_tools: str) -> None:
        if form.tools and with_tools == without_tools:
            raise SampleError("the model's chat template has no place for tools: name 'tools' in data.ignore_fields")
        calls = [call for turn in form.turns for call in turn.calls]
        texts = [text for call in calls for text in (call.name, json.dumps(json.loads(call.arguments)), call.id or "")]
        check_plain([*form.tools, *texts], self._processor.tokenizer)

    def _with_calls(self, pieces: list[Piece], turn: int, prompt_length: int, reply: str) -> list[Piece]:
        """`pieces` with a piece for the calls of `turn`, whose reply with its end is `reply`, where words do not follow
        them: what the template writes after the words of the turn, or after the prompt."""
        starts = _starts(pieces)
        own = [i for i, piece in enumerate(pieces) if piece.kind == "words" and piece.turn == turn]
        start = starts[own[-1] + 1] if own else prompt_length
        stop = prompt_length + length_without_end(reply, self._processor.tokenizer)
        at = max(i for i in range(len(pieces)) if starts[i] <= start)
        text, start, stop = pieces[at].text, start - starts[at], stop - starts[at]
        if start >= stop or stop > len(text) or pieces[at].kind != "template":
            return pieces
        cut = [
            Piece("template", text[:start], pieces[at].turn),
            Piece("calls", text[start:stop], turn),
            Piece("template", text[stop:], turn),
        ]
        return [*pieces[:at], *(piece for piece in cut if piece.text), *pieces[at + 1 :]]

    def _split(self, whole: str, form: Form) -> list[Piece]:
        """The skeleton's text in pieces; the text of a words piece is the number of its text part."""
        turns = list(enumerate(form.turns))
        turn_of = [turn for turn, of_turn in turns for kind in of_turn.kinds if kind != "image"]
        image_turns = [turn for turn, of_turn in turns for kind in of_turn.kinds if kind == "image"]
        image = self._processor.template.image_token
        pattern = _STAND_IN.pattern + (f"|({re.escape(image)})" if image else "|((?!))")
        pieces: list[Piece] = []
        seen_words: list[int] = []
        num_images = at = turn = 0
        for match in re.finditer(pattern, whole):
            if match.start() > at:
                pieces.append(Piece("template", whole[at : match.start()], turn))
            at = match.end()
            if match.group(1) is not None:
                number = int(match.group(1))
                seen_words.append(number)
                turn = turn_of[number]
                pieces.append(Piece("words", str(number), turn))
            else:
                turn = image_turns[num_images] if num_images < len(image_turns) else turn
                num_images += 1
                pieces.append(Piece("image", match.group(), turn))
        if at < len(whole):
            pieces.append(Piece("template", whole[at:], turn))
        if missing := set(_needed_words(form)) - set(seen_words):
            role = form.turns[turn_of[min(missing)]].role
            raise SampleError(
                "the model's chat template does not show every text of the conversation exactly once: one of turn "
                f"{turn_of[min(missing)] + 1} ({role}) is missing"
            )
        if len(seen_words) > len(set(seen_words)):
            raise SampleError("the model's chat template does not show every text of the conversation exactly once")
        if num_images != len(image_turns):
            raise SampleError(
                f"the model's chat template writes {num_images} placeholders for {len(image_turns)} images"
            )
        return pieces

    def _answer(self, pieces: list[Piece], turn: int, prompt_length: int, closing: str) -> Answer:
        starts = _starts(pieces)
        own = [i for i, piece in enumerate(pieces) if piece.kind in ("words", "calls") and piece.turn == turn]
        first, last = own[0], own[-1]
        if prompt_length > starts[first]:
            raise SampleError("the model's chat template writes words of the answer into its prompt")
        border = max(i for i in range(first + 1) if starts[i] <= prompt_length)
        after = last + 1
        end, other_end = None, False
        if after < len(pieces) and pieces[after].kind == "template":
            length, other_end = self._end(pieces[after].text, closing.rpartition(_in_skeleton(pieces[last]))[2])
            end = (after, length) if length else None
        return Answer((border, prompt_length - starts[border]), last, end, other_end)

    def _end(self, following: str, closing: str) -> tuple[int, bool]:
        """Characters of `following`, the template's text after a reply, that its end takes, 0 where there is none; and
        whether another token ends it there. `closing` is the text after the reply where it is the last.

        Several special tokens may close a reply: its end is the one that stops generation, or else the first.
        """
        ends = list(self._closing_tokens(closing, len(closing) - len(closing.lstrip())))
        end = next((end for end, stops in ends if stops), ends[0][0] if ends else 0)
        if end and following.startswith(closing[:end]):
            return end, False
        others = list(self._closing_tokens(following, 0))
        length = next((end for end, stops in others if stops), 0)
        return length, not length and bool(ends) and bool(others)

    def _closing_tokens(self, text: str, at: int) -> Iterator[tuple[int, bool]]:
        """Where each of the special tokens one after the other from `at` ends, and whether it stops generation."""
        tokenizer = self._processor.tokenizer
        while match := tokenizer.traits.special_tokens.match(text, at):
            at = match.end()
            yield at, tokenizer.id_of(match.group()) in tokenizer.traits.eos_ids


_STAND_IN = re.compile(r"Zq(\d+)qZ")


def _stand_in(number: int) -> str:
    return f"Zq{number}qZ"


def _in_skeleton(piece: Piece) -> str:
    return _stand_in(int(piece.text)) if piece.kind == "words" else piece.text


def _starts(pieces: list[Piece]) -> list[int]:
    """Where each piece begins in the skeleton's text, and where the last one ends."""
    return list(itertools.accumulate((len(_in_skeleton(piece)) for piece in pieces), initial=0))


def _is_whole(form: TurnForm, kinds: list[Kind]) -> bool:
    """Whether the pieces of a turn have all its texts: templates leave the reasoning of earlier turns out."""
    num_texts = len(form.kinds) - form.kinds.count("image")
    return kinds.count("words") == num_texts and (num_texts > 0 or "calls" in kinds)


def _form(conversation: Conversation) -> Form:
    return Form(tuple(map(_turn_form, conversation.messages)), conversation.tools)


def _turn_form(message: Message) -> TurnForm:
    kinds = tuple("image" if isinstance(part, Image) else "text" for part in message.parts)
    kinds = ("reasoning", *kinds) if message.reasoning else kinds
    return TurnForm(message.role, kinds, message.calls, message.name, message.call_id)


def _words(conversation: Conversation) -> Iterator[str]:
    """The texts of the conversation, numbered as in its skeleton."""
    for message in conversation.messages:
        if message.reasoning:
            yield message.reasoning
        yield from (part.text for part in message.parts if isinstance(part, Text))


def _needed_words(form: Form) -> Iterator[int]:
    """The numbers of the texts that the template must show: templates leave the reasoning of earlier turns out."""
    kinds = [(turn, kind) for turn, of_turn in enumerate(form.turns) for kind in of_turn.kinds if kind != "image"]
    last = len(form.turns) - 1
    return (number for number, (turn, kind) in enumerate(kinds) if kind == "text" or turn == last)


def _stand_ins(form: Form) -> Conversation:
    """A conversation of this form with stand-ins for its texts."""
    numbers = itertools.count()
    messages: list[Message] = []
    for role, kinds, calls, name, call_id in form.turns:
        reasoning = _stand_in(next(numbers)) if "reasoning" in kinds else ""
        parts: list[Part] = [
            Image("") if kind == "image" else Text(_stand_in(next(numbers))) for kind in kinds if kind != "reasoning"
        ]
        messages.append(Message(role, tuple(parts), reasoning=reasoning, calls=calls, name=name, call_id=call_id))
    return Conversation(tuple(messages), tools=form.tools)


def _as_rendered(words: str, following: str, whole: str, at: int) -> str:
    """The words as they stand in `whole` at `at`: as written, trimmed, or escaped as in JSON, as some templates do."""
    for variant in (words, words.lstrip(), words.rstrip(), words.strip()):
        if whole.startswith(variant + following, at):
            return variant
    escaped = json.dumps(words, ensure_ascii=False)[1:-1]
    if whole.startswith(escaped + following, at):
        return escaped
    raise SampleError(f"the model's chat template changes the words {shown(words, 40)}")
