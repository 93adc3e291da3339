"""A conversation laid out as text by the model's own chat template, with every word's place known.

Nothing is searched for in the finished text. The conversation is rendered twice: once with each text replaced by a
unique stand-in, which shows what the template writes around the words, and once as it is. Words put into the first
must give the second, character for character; otherwise the template rewrites the words, and the sample is refused.
The first rendering depends only on the form of the conversation (roles and kinds of parts) and is kept.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, Image, Message, Messages, SampleError, Text
from mmtrain.safe_text import shown

Kind = Literal["template", "words", "image"]
Form = tuple[tuple[str, tuple[str, ...]], ...]
"""What the template's own text depends on: each turn's role and the kinds of its parts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the rendered text: the template's own, words of a turn, or the placeholder of an image."""

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
        whole = self._processor.template.render(as_messages(conversation))
        words = [part.text for message in conversation.messages for part in message.parts if isinstance(part, Text)]
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
        render = self._processor.template.render
        messages = _stand_ins(form)
        whole = render(messages)
        pieces = self._split(whole, form)
        answers = {}
        for turn, (role, _) in enumerate(form):
            if role != "assistant" or turn == 0:
                continue  # without a turn before it there is no prompt
            prompt = render(messages[:turn], add_generation_prompt=True)
            closing = render(messages[: turn + 1])
            if not whole.startswith(prompt):
                continue  # the template rewrites earlier turns: this one cannot be trained on in the whole
            answers[turn] = self._answer(pieces, turn, len(prompt), closing)
        return Skeleton(tuple(pieces), answers)

    def _split(self, whole: str, form: Form) -> list[Piece]:
        """The skeleton's text in pieces; the text of a words piece is the number of its text part."""
        turn_of = [turn for turn, (_, kinds) in enumerate(form) for kind in kinds if kind == "text"]
        image_turns = [turn for turn, (_, kinds) in enumerate(form) for kind in kinds if kind == "image"]
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
        if sorted(seen_words) != list(range(len(turn_of))):
            raise SampleError("the model's chat template does not show every text of the conversation exactly once")
        if num_images != len(image_turns):
            raise SampleError(
                f"the model's chat template writes {num_images} placeholders for {len(image_turns)} images"
            )
        return pieces

    def _answer(self, pieces: list[Piece], turn: int, prompt_length: int, closing: str) -> Answer:
        starts, at = [], 0
        for piece in pieces:
            starts.append(at)
            at += len(_stand_in(int(piece.text))) if piece.kind == "words" else len(piece.text)
        own = [i for i, piece in enumerate(pieces) if piece.kind == "words" and piece.turn == turn]
        first, last = own[0], own[-1]
        if prompt_length > starts[first]:
            raise SampleError("the model's chat template writes words of the answer into its prompt")
        border = max(i for i in range(first + 1) if starts[i] <= prompt_length)
        after = last + 1
        end, other_end = None, False
        if after < len(pieces) and pieces[after].kind == "template":
            length, other_end = self._end(pieces[after].text, closing.rpartition(_stand_in(int(pieces[last].text)))[2])
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


def _form(conversation: Conversation) -> Form:
    return tuple(
        (message.role, tuple("image" if isinstance(part, Image) else "text" for part in message.parts))
        for message in conversation.messages
    )


def _stand_ins(form: Form) -> Messages:
    number = 0
    messages: Messages = []
    for role, kinds in form:
        content: list[dict[str, str]] = []
        for kind in kinds:
            content.append({"type": "image"} if kind == "image" else {"type": "text", "text": _stand_in(number)})
            number += kind == "text"
        messages.append({"role": role, "content": content})
    return messages


def as_messages(conversation: Conversation) -> Messages:
    """The conversation as chat templates take it, content in parts."""
    return [{"role": message.role, "content": _content(message)} for message in conversation.messages]


def _content(message: Message) -> list[dict[str, str]]:
    return [
        {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text} for part in message.parts
    ]


def _as_rendered(words: str, following: str, whole: str, at: int) -> str:
    """The words as they stand in `whole` at `at`: as written, or trimmed as some templates do."""
    for variant in (words, words.lstrip(), words.rstrip(), words.strip()):
        if whole.startswith(variant + following, at):
            return variant
    raise SampleError(f"the model's chat template changes the words {shown(words, 40)}")
