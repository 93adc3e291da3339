"""The prompts for earlier turns of a conversation, from the prompt for its last one.

Rendering and encoding a prompt for every turn takes a time that grows with the square of the number of turns. Mostly
the prompt for a turn is the beginning of the prompt for the last one, up to a special token that takes nothing of the
text around it, and then what the template writes before every reply. The tokenizer encodes the text on each side of
such a token separately, so the same is true of the ids. Whether it is so is found for each form of conversation with
stand-ins for its texts, and tried on the first conversation of that form. A derived prompt is never the reason of a
fault: where the ids of a sample differ from it, the prompt is made as inference makes it.
"""

import functools
from collections.abc import Callable, Sequence

from mmtrain.checks.reply_frame import FormKey, form_key, form_of
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.reasoning import CLOSE

_MAX_FORMS = 4096
_Starts = dict[int, tuple[int, tuple[int, ...]]]
"""By turn, how many parting tokens of the last prompt its own has, and the ids after them."""
_Form = tuple[int, _Starts]
"""The number of parting tokens in the last prompt, and what the earlier ones have of it."""


class EarlierPrompts:
    """Prompts for earlier turns, with one model."""

    def __init__(self, processor: ChatProcessor, as_input: Callable[[Conversation, int], tuple[str, bool]]) -> None:
        """`as_input`: the prompt for a turn as the tokenizer is given it, and whether that adds its special tokens."""
        self._tokenizer, self._as_input = processor.tokenizer, as_input
        traits = self._tokenizer.traits
        self._parting = traits.parting_tokens
        self._parting_ids = {id_ for id_, token in traits.added.items() if traits.parting_tokens.fullmatch(token)}
        self._forms: dict[tuple[FormKey, tuple[int, ...]], _Form | None] = {}
        self._tail = functools.lru_cache(maxsize=4096)(self._encoded_tail)

    def form(self, conversation: Conversation, turns: Sequence[int]) -> _Form | None:
        """How the prompts for `turns` begin the last of them; None where each is to be made by itself."""
        messages = conversation.messages
        if len(turns) < 2 or any(one.reasoning or one.calls or CLOSE in one.text for one in messages):
            return None
        key = form_key(conversation), tuple(turns)
        if key not in self._forms:
            if len(self._forms) >= _MAX_FORMS:
                self._forms.clear()
            found = self._of_form(form_of(conversation), turns)
            self._forms[key] = found if found is not None and self._holds(found, conversation, turns) else None
        return self._forms[key]

    def _holds(self, form: _Form, conversation: Conversation, turns: Sequence[int]) -> bool:
        """Whether the earlier prompts of a conversation are those that are derived from the last one."""
        try:
            *earlier, last = [self._ids(*self._as_input(conversation, turn)) for turn in turns]
        except SampleError:
            return False
        return self.derived(form, last) == dict(zip(turns, earlier, strict=False))

    def _ids(self, text: str, adds: bool) -> list[int]:
        return self._tokenizer.encode_for_inference([text], adds)[0]

    def derived(self, form: _Form, last: list[int]) -> dict[int, list[int]] | None:
        """The earlier prompts of a conversation whose last one is `last`; None where its own text has such tokens."""
        num_parting, starts = form
        at = [position for position, token in enumerate(last) if token in self._parting_ids]
        if len(at) != num_parting:
            return None
        return {turn: [*last[: at[count - 1] + 1], *tail] for turn, (count, tail) in starts.items()}

    def _of_form(self, form: Conversation, turns: Sequence[int]) -> _Form | None:
        try:
            *earlier, (last, adds) = [self._as_input(form, turn) for turn in turns]
        except SampleError:
            return None
        starts: _Starts = {}
        for turn, (text, _) in zip(turns, earlier, strict=False):
            parting = list(self._parting.finditer(text))
            tail = self._tail(parting[-1].group(), text[parting[-1].end() :], adds) if parting else None
            if tail is None or not last.startswith(text[: parting[-1].end()]):
                return None
            starts[turn] = len(parting), tail
        return len(list(self._parting.finditer(last))), starts

    def _encoded_tail(self, parting: str, tail: str, adds: bool) -> tuple[int, ...] | None:
        """The ids of `tail` after a parting token, None where they cannot be told apart."""
        alone, added = self._ids(parting + tail, False), self._ids(parting + tail, adds)
        is_first = alone[:1] == [self._tokenizer.id_of(parting)]
        return tuple(alone[1:]) if is_first and added[len(added) - len(alone) :] == alone else None
