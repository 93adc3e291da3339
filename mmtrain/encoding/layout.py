"""A conversation laid out as text by the model's own chat template, with every word's place known.

Nothing is searched for in the finished text. The conversation is rendered twice: once with each text replaced by a
unique stand-in, which shows what the template writes around the words, and once as it is. Words put into the first
must give the second, character for character; otherwise the template rewrites the words, and the sample is refused.
The first rendering depends only on the form of the conversation (roles and kinds of parts) and is kept.

Some templates write a reply in another way once others follow, or begin it in another way than the prompt for it: they
drop the reasoning of earlier replies, for example. Such a reply is laid out alone: the prompt of inference, the reply
as the template writes it last, and its end.
"""

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.stand_ins import (
    STAND_IN,
    Content,
    Form,
    Marks,
    marks_of,
    numbered,
    reasoned_text,
    stand_in,
    stand_ins,
)
from mmtrain.records.chat import Conversation, Image, Message, Messages, SampleError, Text
from mmtrain.records.reasoning import CLOSE, OPEN, split_reasoning
from mmtrain.safe_text import shown

Kind = Literal["template", "words", "image"]


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


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """A conversation of which the last reply alone is trained on, after the prompt of inference."""

    skeleton: Skeleton
    num_prompt: int
    """Pieces of the prompt."""
    closing: tuple[Piece, ...]
    """What the template writes for the conversation with the reply."""
    num_before: int
    """Pieces of `closing` before the words of the reply."""


class Layout:
    """Lays conversations out by one model's template."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self._render = processor.template.render
        self._whole = functools.lru_cache(maxsize=4096)(self._try_skeleton)
        self._alone = functools.lru_cache(maxsize=4096)(self._lone_skeleton)

    def skeleton(self, form: Form) -> Skeleton:
        """Raises SampleError where the template refuses conversations of this form, or does not show all of one."""
        found = self._whole(form)
        if isinstance(found, str):
            raise SampleError(found)
        return found

    def form(self, conversation: Conversation) -> Form:
        return tuple([(message.role, self._kinds(message)) for message in conversation.messages])

    def is_together(self, form: Form, turns: Collection[int]) -> bool:
        """Whether these replies can be trained on in one sequence: each is written there as inference would see it."""
        found = self._whole(form)
        return not isinstance(found, str) and all(turn in found.answers for turn in turns)

    def lay_out(self, conversation: Conversation, form: Form) -> tuple[list[Piece], Skeleton]:
        """The pieces of the rendered text and the skeleton they follow. `form` is that of the conversation.

        Raises SampleError where the template refuses the conversation or rewrites its words.
        """
        skeleton = self.skeleton(form)
        whole = self._render(as_messages(conversation))
        return _filled(skeleton.pieces, _words(conversation, form), whole), skeleton

    def lay_out_alone(self, conversation: Conversation, form: Form) -> tuple[list[Piece], Skeleton]:
        """The same for its last turn, after the prompt that inference would give for it."""
        alone, words = self._alone(form), _words(conversation, form)
        messages = as_messages(conversation)
        pieces = alone.skeleton.pieces
        prompt = _filled(pieces[: alone.num_prompt], words, self._render(messages[:-1], add_generation_prompt=True))
        closing = _filled(alone.closing, words, self._render(messages))
        tail = closing[alone.num_before :]
        between = pieces[alone.num_prompt : len(pieces) - len(tail)]
        own = [
            replace(piece, text=words[int(piece.text)].strip()) if piece.kind == "words" else piece for piece in between
        ]
        return [*prompt, *own, *tail], alone.skeleton

    @functools.cached_property
    def _rewrites_reasoning(self) -> bool:
        """Whether the template treats reasoning in a reply as more than text: drops it, or writes it in another way."""
        if (self._processor.template.traits.generation_prompt or "").rstrip().endswith((OPEN, CLOSE)):
            return True
        exchange: Form = (("user", ("text",)), ("assistant", ("text",)))
        for form in (exchange * 2, exchange):
            plain, reasoned = stand_ins(form), stand_ins(form)
            texts = {
                stand_in(number): reasoned_text(Marks(f"{OPEN}\n", f"\n{CLOSE}\n\n"), number + 10, number)
                for number in range(1, len(form), 2)
            }
            for message in reasoned[1::2]:
                message["content"] = [{"type": "text", "text": texts[message["content"][0]["text"]]}]
            try:
                expected, found = self._render(plain), self._render(reasoned)
            except SampleError:  # such as a template that takes one reply
                continue
            for before, after in texts.items():
                expected = expected.replace(before, after)
            return found != expected
        return False

    def _kinds(self, message: Message) -> tuple[Content, ...]:
        kinds: list[Content] = ["image" if isinstance(part, Image) else "text" for part in message.parts]
        first = message.parts[0] if message.role == "assistant" and message.parts else None
        if isinstance(first, Text) and CLOSE in first.text and self._rewrites_reasoning:
            found = split_reasoning(first.text)
            kinds[0] = "text" if found is None else Marks(found.opening, found.close)
        return tuple(kinds)

    def _try_skeleton(self, form: Form) -> Skeleton | str:
        """The skeleton, or why there is none."""
        try:
            return self._skeleton(form)
        except SampleError as error:
            return str(error)

    def _skeleton(self, form: Form) -> Skeleton:
        messages = stand_ins(form)
        whole = self._render(messages)
        pieces = self._split(whole, form, 0)
        answers = {}
        for turn, (role, _) in enumerate(form):
            if role != "assistant" or turn == 0:
                continue  # without a turn before it there is no prompt
            prompt = self._render(messages[:turn], add_generation_prompt=True)
            closing = self._render(messages[: turn + 1])
            if not whole.startswith(prompt) or _hidden(pieces, form, turn) is not None:
                continue  # the template rewrites earlier turns: this one cannot be trained on in the whole
            if marks_of(form, turn) and _opens(prompt) and whole[len(prompt) :].lstrip().startswith(OPEN):
                continue  # reasoning would be opened twice
            answers[turn] = self._answer(pieces, turn, len(prompt), closing)
        return Skeleton(tuple(pieces), answers)

    def _lone_skeleton(self, form: Form) -> _Alone:
        messages, turn = stand_ins(form), len(form) - 1
        prompt, closing = self._render(messages[:-1], add_generation_prompt=True), self._render(messages)
        _check_reasoning(prompt, form, turn)
        before, after = self._split(prompt, form[:-1], 0), self._split(closing, form, turn)
        num_before = next(i for i, piece in enumerate(after) if piece.kind == "words" and piece.turn == turn)
        own: list[Piece] = []
        marks, number = marks_of(form, turn), _hidden(after, form, turn)
        if marks is not None and number is not None:
            own = [Piece("words", str(number), turn), Piece("template", marks.close, turn)]
            if not _opens(prompt):
                own.insert(0, Piece("template", marks.opening, turn))
        pieces = [*before, *own, *after[num_before:]]
        answer = self._answer(pieces, turn, len(prompt), closing)
        return _Alone(Skeleton(tuple(pieces), {turn: answer}), len(before), tuple(after), num_before)

    def _split(self, whole: str, form: Form, first: int) -> list[Piece]:
        """A rendered text in pieces; the text of a words piece is the number of its stand-in.

        Raises SampleError unless all the texts from turn `first` on are there exactly once. Reasoning may be missing.
        """
        numbers = list(numbered(form))
        image_turns = [turn for turn, (_, kinds) in enumerate(form) for kind in kinds if kind == "image"]
        image = self._processor.template.image_token
        pattern = STAND_IN.pattern + (f"|({re.escape(image)})" if image else "|((?!))")
        pieces: list[Piece] = []
        num_images = at = turn = 0
        for match in re.finditer(pattern, whole):
            if match.start() > at:
                pieces.append(Piece("template", whole[at : match.start()], turn))
            at = match.end()
            if match.group(1) is not None:
                turn = numbers[int(match.group(1))][0]
                pieces.append(Piece("words", match.group(1), turn))
            else:
                turn = image_turns[num_images] if num_images < len(image_turns) else turn
                num_images += 1
                pieces.append(Piece("image", match.group(), turn))
        if at < len(whole):
            pieces.append(Piece("template", whole[at:], turn))
        seen = [int(piece.text) for piece in pieces if piece.kind == "words"]
        wanted = {n for n, (turn, is_reasoning) in enumerate(numbers) if turn >= first and not is_reasoning}
        if len(seen) > len(set(seen)) or not wanted <= set(seen):
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
            at += len(stand_in(int(piece.text))) if piece.kind == "words" else len(piece.text)
        own = [i for i, piece in enumerate(pieces) if piece.kind == "words" and piece.turn == turn]
        first, last = own[0], own[-1]
        if prompt_length > starts[first]:
            raise SampleError("the model's chat template writes words of the answer into its prompt")
        border = max(i for i in range(first + 1) if starts[i] <= prompt_length)
        after = last + 1
        end, other_end = None, False
        if after < len(pieces) and pieces[after].kind == "template":
            length, other_end = self._end(pieces[after].text, closing.rpartition(stand_in(int(pieces[last].text)))[2])
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


def _words(conversation: Conversation, form: Form) -> list[str]:
    """The words of the conversation by the number of their stand-in."""
    found: list[str] = []
    for message, (_, kinds) in zip(conversation.messages, form, strict=True):
        for part, kind in zip(message.parts, kinds, strict=True):
            if not isinstance(part, Text):
                continue
            reasoned = split_reasoning(part.text) if isinstance(kind, Marks) else None
            found += (part.text,) if reasoned is None else (reasoned.reasoning, reasoned.reply)
    return found


def _hidden(pieces: list[Piece], form: Form, turn: int) -> int | None:
    """The stand-in for the reasoning of a turn that is not among the pieces."""
    seen = {piece.text for piece in pieces if piece.kind == "words"}
    numbers = (number for number, found in enumerate(numbered(form)) if found == (turn, True))
    return next((number for number in numbers if str(number) not in seen), None)


def _opens(prompt: str) -> bool:
    """Whether the prompt for a reply begins its reasoning."""
    return prompt.rstrip().endswith(OPEN)


def _check_reasoning(prompt: str, form: Form, turn: int) -> None:
    """Raises SampleError where a reply reasons and the prompt for it says that it does not, or the other way round."""
    is_reasoned = marks_of(form, turn) is not None
    if is_reasoned and prompt.rstrip().endswith(CLOSE):
        raise SampleError(
            f"turn {turn + 1} has reasoning, and the prompt for it ends with {CLOSE}: set labels.reasoning to drop, or "
            "give a template whose prompt lets the model reason as model.chat_template"
        )
    if not is_reasoned and _opens(prompt):
        raise SampleError(
            f"turn {turn + 1} has no reasoning, and the prompt for it ends with {OPEN}: begin the reply with "
            f"{OPEN}...{CLOSE}, or give a template whose prompt does not reason as model.chat_template"
        )


def as_messages(conversation: Conversation) -> Messages:
    """The conversation as chat templates take it, content in parts."""
    return [{"role": message.role, "content": _content(message)} for message in conversation.messages]


def _content(message: Message) -> list[dict[str, str]]:
    return [
        {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text} for part in message.parts
    ]


def _filled(skeleton: Sequence[Piece], words: Sequence[str], whole: str) -> list[Piece]:
    """The pieces with words in the place of numbers. Raises SampleError unless they are the rendered text `whole`."""
    pieces, at = [], 0
    for i, piece in enumerate(skeleton):
        text = piece.text
        if piece.kind == "words":
            following = skeleton[i + 1].text if i + 1 < len(skeleton) and skeleton[i + 1].kind != "words" else ""
            text = _as_rendered(words[int(piece.text)], following, whole, at)
        if not whole.startswith(text, at):
            raise SampleError(f"the model's chat template rewrites the conversation near {shown(whole[at : at + 40])}")
        pieces.append(Piece(piece.kind, text, piece.turn))
        at += len(text)
    if at != len(whole):
        raise SampleError(f"the model's chat template adds {shown(whole[at : at + 40])} to the conversation")
    return pieces


def _as_rendered(words: str, following: str, whole: str, at: int) -> str:
    """The words as they stand in `whole` at `at`: as written, or trimmed as some templates do."""
    trimmed = (words.lstrip(), words.rstrip(), words.strip(), words.lstrip("\n"), words.rstrip("\n"), words.strip("\n"))
    for variant in (words, *trimmed):
        if whole.startswith(variant + following, at):
            return variant
    raise SampleError(f"the model's chat template changes the words {shown(words, 40)}")
