"""A conversation laid out as text by the model's own chat template, with the place of each of its texts known.

Nothing is searched for in the finished text. The conversation is rendered twice: once with each text replaced by a
unique stand-in, which shows what the template writes around the texts, and once as it is. The texts put into the first
must give the second, character for character; otherwise the template rewrites a text, and the sample is refused.
The first rendering depends only on the form of the conversation (roles, kinds of parts, tools and calls) and is cached.
Tools and calls are in it as they are; `encoding/calls.py` finds where a call is.

Some templates write a reply in another way once others follow, or begin it in another way than the prompt for it: they
drop the reasoning of earlier replies, for example. Such a reply is laid out alone: the prompt of inference, the reply
as the template writes it last, and its end.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mmtrain.encoding.calls import check_plain, length_without_end, shared_reply, shows_all
from mmtrain.encoding.messages import as_messages, as_tools
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.reasoning import check_reasoning, opens, rewrites_reasoning
from mmtrain.encoding.skeleton import (
    Offset,
    Piece,
    ReplyBounds,
    Skeleton,
    check_shown,
    filled,
    hidden_reasoning,
    in_skeleton,
    is_whole,
    starts_of,
)
from mmtrain.encoding.stand_ins import STAND_IN, Form, numbered, stand_ins, texts_of, turn_form
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.reasoning import CLOSE, OPEN
from mmtrain.safe_text import counted


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """A conversation of which the last reply alone is trained on, after the prompt of inference."""

    skeleton: Skeleton
    num_prompt: int
    """Pieces of the prompt."""
    closing: tuple[Piece, ...]
    """What the template writes for the conversation with the reply."""
    num_before: int
    """Pieces of `closing` before the text of the reply."""


class Layout:
    """Lays conversations out by one model's template."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self._render = processor.template.render
        self._rewrites_reasoning = functools.cache(lambda: rewrites_reasoning(processor.template))
        self._whole = functools.lru_cache(maxsize=4096)(self._try_skeleton)
        self._alone = functools.lru_cache(maxsize=4096)(self._lone_skeleton)

    def skeleton(self, form: Form) -> Skeleton:
        """Raises SampleError where the template refuses conversations of this form, or does not show all of one."""
        found = self._whole(form)
        if isinstance(found, str):
            raise SampleError(found)
        return found

    def fault(self, form: Form) -> str | None:
        """Why conversations of this form have no skeleton, None where they have one."""
        found = self._whole(form)
        return found if isinstance(found, str) else None

    def form(self, conversation: Conversation) -> Form:
        messages, has_reasoning = conversation.messages, any(CLOSE in message.text for message in conversation.messages)
        splits = has_reasoning and self._rewrites_reasoning()
        return Form(tuple([turn_form(message, splits) for message in messages]), conversation.tools)

    def is_together(self, form: Form, turns: Collection[int]) -> bool:
        """Whether these replies can be trained on in one sequence: each is written there as inference would see it."""
        found = self._whole(form)
        return not isinstance(found, str) and all(turn in found.replies for turn in turns)

    def lay_out(self, conversation: Conversation, form: Form) -> tuple[list[Piece], Skeleton]:
        """The pieces of the rendered text and the skeleton they follow. `form` is that of the conversation.

        Raises SampleError where the template refuses the conversation or rewrites its texts.
        """
        skeleton = self.skeleton(form)
        whole = self._render(as_messages(conversation.messages), tools=as_tools(conversation))
        return filled(skeleton.pieces, texts_of(conversation, form), whole), skeleton

    def lay_out_alone(self, conversation: Conversation, form: Form) -> tuple[list[Piece], Skeleton]:
        """The same for its last turn, after the prompt that inference would give for it."""
        try:
            alone, texts = self._alone(form), texts_of(conversation, form)
        except SampleError as error:
            raise SampleError(self.fault(form) or str(error)) from None
        messages, tools = as_messages(conversation.messages), as_tools(conversation)
        pieces, asked = alone.skeleton.pieces, self._render(messages[:-1], add_generation_prompt=True, tools=tools)
        prompt = filled(pieces[: alone.num_prompt], texts, asked)
        tail = filled(alone.closing, texts, self._render(messages, tools=tools))[alone.num_before :]
        between = pieces[alone.num_prompt : len(pieces) - len(tail)]
        own = [piece._replace(text=texts[int(piece.text)]) if piece.kind == "text" else piece for piece in between]
        return [*prompt, *own, *tail], alone.skeleton

    def _try_skeleton(self, form: Form) -> Skeleton | str:
        """The skeleton, or why there is none."""
        try:
            return self._skeleton(form)
        except SampleError as error:
            return str(error)

    def _skeleton(self, form: Form) -> Skeleton:
        conversation = stand_ins(form)
        messages, tools = as_messages(conversation.messages), as_tools(conversation)
        render = functools.partial(self._render, tools=tools)
        self._check_tools(form, whole := render(messages), self._render(messages))
        pieces = self._split(whole, form, 0)
        replies: dict[int, tuple[int, str]] = {}
        for turn, of_turn in enumerate(form.turns):
            if of_turn.role != "assistant" or turn == 0:
                continue  # without a turn before it there is no prompt
            prompt = render(messages[:turn], add_generation_prompt=True)
            closing = render(messages[: turn + 1])
            if not whole.startswith(prompt):
                continue  # the template rewrites earlier turns: this one cannot be trained on in the whole
            if of_turn.marks and opens(prompt) and whole[len(prompt) :].lstrip().startswith(OPEN):
                continue  # reasoning would be opened twice
            if of_turn.calls:
                closing = shared_reply(whole, closing, len(prompt))
                if not shows_all(closing, of_turn.calls):
                    continue
                pieces = self._with_calls(pieces, turn, len(prompt), closing)
            replies[turn] = len(prompt), closing
        bounds = {
            turn: self._bounds(pieces, turn, *reply)
            for turn, reply in replies.items()
            if is_whole(form.turns[turn], [piece.kind for piece in pieces if piece.turn == turn])
        }
        return Skeleton(tuple(pieces), bounds)

    def _lone_skeleton(self, form: Form) -> _Alone:
        conversation, turn = stand_ins(form), len(form.turns) - 1
        messages, tools, last = as_messages(conversation.messages), as_tools(conversation), form.turns[turn]
        prompt = self._render(messages[:-1], add_generation_prompt=True, tools=tools)
        closing = self._render(messages, tools=tools)
        self._check_tools(form, closing, self._render(messages))
        check_reasoning(prompt, last, turn)
        before = self._split(prompt, Form(form.turns[:-1], form.tools), 0)
        after = self._split(closing, form, turn)
        own, hidden = [], hidden_reasoning(after, form, turn)
        if last.calls or (hidden is not None and last.marks is None):
            raise SampleError(
                f"the model's chat template does not show all of turn {turn + 1} as inference would see it"
            )
        if last.marks is not None and hidden is not None:
            own = [Piece("text", str(hidden), turn), Piece("template", last.marks.close, turn)]
            if not opens(prompt):
                own.insert(0, Piece("template", last.marks.opening, turn))
        num_before = next(i for i, piece in enumerate(after) if piece.kind == "text" and piece.turn == turn)
        pieces = [*before, *own, *after[num_before:]]
        bounds = self._bounds(pieces, turn, len(prompt), closing)
        return _Alone(Skeleton(tuple(pieces), {turn: bounds}), len(before), tuple(after), num_before)

    def _check_tools(self, form: Form, with_tools: str, without_tools: str) -> None:
        if form.tools and with_tools == without_tools:
            raise SampleError("the model's chat template has no place for tools: name 'tools' in data.ignore_fields")
        calls = [call for turn in form.turns for call in turn.calls]
        texts = [text for call in calls for text in (call.name, json.dumps(json.loads(call.arguments)), call.id or "")]
        check_plain([*form.tools, *texts], self._processor.tokenizer)

    def _with_calls(self, pieces: list[Piece], turn: int, prompt_length: int, reply: str) -> list[Piece]:
        """`pieces` with a piece for the calls of `turn`, whose reply with its end is `reply`, where no text follows
        them: what the template writes after the text of the turn, or after the prompt."""
        starts = starts_of(pieces)
        own = [i for i, piece in enumerate(pieces) if piece.kind == "text" and piece.turn == turn]
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

    def _split(self, whole: str, form: Form, first: int) -> list[Piece]:
        """A rendered text in pieces; a piece of a turn's text has the number of its stand-in.

        Raises SampleError unless all the texts from turn `first` on are there exactly once. Reasoning may be missing.
        """
        numbers = list(numbered(form))
        image_turns = [turn for turn, of_turn in enumerate(form.turns) for kind in of_turn.kinds if kind == "image"]
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
                pieces.append(Piece("text", match.group(1), turn))
            else:
                turn = image_turns[num_images] if num_images < len(image_turns) else turn
                num_images += 1
                pieces.append(Piece("image", match.group(), turn))
        if at < len(whole):
            pieces.append(Piece("template", whole[at:], turn))
        check_shown(pieces, form, first)
        if num_images != len(image_turns):
            raise SampleError(
                f"the model's chat template writes {num_images} placeholders for {counted(len(image_turns), 'image')}"
            )
        return pieces

    def _bounds(self, pieces: list[Piece], turn: int, prompt_length: int, closing: str) -> ReplyBounds:
        starts = starts_of(pieces)
        own = [i for i, piece in enumerate(pieces) if piece.kind in ("text", "calls") and piece.turn == turn]
        first, last = own[0], own[-1]
        if prompt_length > starts[first]:
            raise SampleError("the model's chat template writes text of the reply into its prompt")
        border = max(i for i in range(first + 1) if starts[i] <= prompt_length)
        after, end, other_end = last + 1, None, False
        if after < len(pieces) and pieces[after].kind == "template":
            length, other_end = self._end(pieces[after].text, closing.rpartition(in_skeleton(pieces[last]))[2])
            end = Offset(after, length) if length else None
        return ReplyBounds(Offset(border, prompt_length - starts[border]), last, end, other_end)

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
