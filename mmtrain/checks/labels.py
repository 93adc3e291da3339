"""Finds faults of labels without the encoder: from ids, labels, conversation, and the model's tokenizer and template.

The check works backwards from the ids: each image is folded to one placeholder; for every trained turn, the ids before
it are compared with those of inference, and the decoded labels with the text of the reply.
"""

import functools
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from mmtrain.checks.content import MARKS, image_notes, literal_specials, placed_images, unmatched_marks
from mmtrain.checks.findings import (
    ADDED_END,
    IGNORED,
    NO_END,
    NO_LABEL,
    NO_TEXT,
    NOT_ITSELF,
    OTHER_END,
    OUTSIDE,
    PROMPT,
    REPLY,
    WHITE_SPACE,
    Finding,
)
from mmtrain.checks.folding import Ids, fold_images
from mmtrain.checks.inference import Inference, Prompts
from mmtrain.checks.reply_frame import FormKey, ReplyFrame, form_key, form_of, reply_frame, texts_of, without_end
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.segments import Known
from mmtrain.records.chat import Conversation, Message
from mmtrain.records.reasoning import CLOSE, OPEN
from mmtrain.safe_text import shown

_MAX_FRAMES = 4096
_WINDOW = 4
"""Tokens before a span that are decoded with it: some tokenizers drop a space at the start of a text."""

_RUNS = re.compile(rb"\x01+")
"""Of true flags, one byte each."""

_Span = tuple[int, int]
"""A run of supervised tokens: ids[start:end]."""


class _FoldedSample(NamedTuple):
    """One sample with each image folded to one placeholder."""

    conversation: Conversation
    ids: list[int]
    labels: list[int]
    spans: list[_Span]
    prompts: Prompts
    form: FormKey

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages


class Checker:
    """Checks the samples of one model and one `labels` section of the config."""

    def __init__(
        self,
        processor: ChatProcessor,
        train_on: str = "assistant",
        end_of_turn: bool = True,
        ignored: Collection[str] = (),
    ) -> None:
        """`ignored`: marks that are allowed in text, from `data.ignore_fields`."""
        self._marks = [] if processor.images is None else [mark for mark in MARKS if mark not in ignored]
        self._processor = processor
        self._train_on = train_on
        self._end_of_turn = end_of_turn
        self._inference = Inference(processor)
        self._frames: dict[tuple[FormKey, int], ReplyFrame] = {}
        self._decoded = functools.lru_cache(maxsize=4096)(processor.tokenizer.decode)
        """Of the few ids before a reply, which are the same in most samples."""

    def prompts(self, conversations: Sequence[Conversation], known: Known) -> list[Prompts]:
        """What `check` needs of each conversation, all encoded at once: the prompts for its trained turns. `known`: the
        ids of texts that were encoded before."""
        return self._inference.prompts([(one, self._trained(one.messages)) for one in conversations], known)

    def check(
        self,
        ids: Ids,
        labels: Ids,
        conversation: Conversation,
        sizes: Sequence[tuple[int, int]],
        prompts: Prompts | None = None,
    ) -> list[Finding]:
        """The faults and notes of one sample.

        `labels` are unshifted, -100 where ignored; `sizes` are the (width, height) of the images in order; `prompts`
        are what `prompts` gives for the conversation, made if it is None. Raises SampleError if the template refuses
        the conversation, or the processor the size of an image.
        """
        if not (spans := _spans(labels)):
            return [Finding.fault(NO_LABEL, "no token of it is trained on")]
        own_ids, own_labels = ids.tolist(), labels.tolist()
        found: list[Finding] = []
        if any(own_ids[start:end] != own_labels[start:end] for start, end in spans):
            found.append(_wrong_labels(ids, labels))
        image_id = self._processor.image_token_id
        if sizes or (image_id is not None and image_id in own_labels):
            ids, labels, faults = fold_images(ids, labels, sizes, self._processor)
            own_ids, own_labels, spans = ids.tolist(), labels.tolist(), _spans(labels)
            found += faults
        made = self.prompts([conversation], {})[0] if prompts is None else prompts
        found += self._turns(_FoldedSample(conversation, own_ids, own_labels, spans, made, form_key(conversation)))
        found += unmatched_marks(conversation.messages, self._marks)
        found += literal_specials(conversation.messages, self._processor)
        found += placed_images(conversation)
        if sizes:
            found += image_notes(sizes, self._processor)
        return list(dict.fromkeys(found))

    def _trained(self, messages: tuple[Message, ...]) -> list[int]:
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        return [turn for turn in (turns[-1:] if self._train_on == "last" else turns) if messages[turn].train]

    def _turns(self, sample: _FoldedSample) -> list[Finding]:
        """Matches the supervised spans with the turns that are to be trained on, and checks them."""
        trained = self._trained(sample.messages)
        if len(sample.spans) == len(trained):  # the usual case: in order, as the text before each span proves
            pairs = {turn: [span] for turn, span in zip(trained, sample.spans, strict=True)}
            found = [finding for turn, spans in pairs.items() for finding in self._prompt(sample, turn, spans[0])]
            if not any(finding.is_fault for finding in found):
                return found + [finding for turn in trained for finding in self._reply(sample, turn, pairs[turn])]
        pairs, found = self._by_overlap(sample, trained), []
        for turn in trained:
            if pairs.get(turn):
                found += self._prompt(sample, turn, pairs[turn][0])
            found += self._reply(sample, turn, pairs.get(turn, []))
        strays = [(turn, span) for turn, spans in pairs.items() if turn not in trained for span in spans]
        return found + [self._outside(sample, turn, span) for turn, span in strays]

    def _outside(self, sample: _FoldedSample, turn: int, span: _Span) -> Finding:
        where = f"turn {turn + 1} ({sample.messages[turn].role})" if turn >= 0 else "the text outside the replies"
        text = self._processor.tokenizer.decode(sample.ids[slice(*span)])
        return Finding.fault(OUTSIDE, f"{where} is not to be trained on, but {shown(text)} is")

    def _by_overlap(self, sample: _FoldedSample, trained: list[int]) -> dict[int, list[_Span]]:
        """The spans by the assistant turn that they overlap most, or -1; in characters without white space."""
        replies: dict[int, tuple[int, int]] = {}
        for turn, message in enumerate(sample.messages):
            if message.role == "assistant" and turn > 0:
                texts = (
                    self._inference.rendered(sample.conversation, turn, begun=True),
                    self._inference.rendered(sample.conversation, turn + 1),
                )
                ids = map(self._inference.ids, texts)
                first, last = map(self._num_characters, ids)
                replies[turn] = first, last
        found: dict[int, list[_Span]] = {}
        for span in sample.spans:
            start, end = (self._num_characters(self._without_added_ends(sample, at, trained)) for at in span)
            overlaps = {turn: min(end, last) - max(start, first) for turn, (first, last) in replies.items()}
            best = max(overlaps, key=overlaps.__getitem__, default=-1)
            found.setdefault(best if overlaps.get(best, 0) > 0 else -1, []).append(span)
        return found

    def _num_characters(self, ids: list[int]) -> int:
        return len(_squeezed(self._processor.tokenizer.decode(ids)))

    def _prompt(self, sample: _FoldedSample, turn: int, span: _Span) -> Iterator[Finding]:
        """Checks that the ids before a reply are those that inference would give to the model."""
        start = span[0]
        actual = sample.ids[:start]
        if actual == sample.prompts.get(turn):
            return
        # made in another way than inference does, or not at all where the template refuses it: the error says why
        expected = self._inference.ids(self._inference.rendered(sample.conversation, turn, begun=True))
        if actual == expected:
            return
        trained = [earlier for earlier in self._trained(sample.messages) if earlier < turn]
        actual = self._without_added_ends(sample, start, trained)
        added = len(actual) < start
        if added:
            yield Finding.note(ADDED_END, f"turn {turn + 1} follows an end token that is not in inference's text")
        if actual == expected:
            return
        literal = any(literal_specials(sample.messages[:turn], self._processor))
        decode = self._processor.tokenizer.decode
        one, two = _normal(decode(actual)), _normal(decode(expected))
        loose = literal or added  # a special token, or a missing one, can move a space of SentencePiece
        same = _squeezed(one) == _squeezed(two) if loose else one == two
        if same and (loose or self._differ_at_borders(actual, expected, sample, start)):
            if not loose:
                yield Finding.note(WHITE_SPACE, f"a reply before turn {turn + 1} has a border inside a token")
            return
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        here = f"{shown(one[max(0, at - 20) : at + 20])}, inference has {shown(two[max(0, at - 20) : at + 20])}"
        yield Finding.fault(PROMPT, f"before turn {turn + 1} the ids have {here}")

    def _differ_at_borders(self, actual: list[int], expected: list[int], sample: _FoldedSample, end: int) -> bool:
        """Whether every difference is at the border of an earlier reply: both sides of it are encoded separately.

        At the end of a reply this matters only if the template writes no end token there.
        """
        borders = [border for span in sample.spans for border in span if border < end]
        changes = SequenceMatcher(None, actual, expected, autojunk=False).get_opcodes()
        return all(
            tag == "equal" or any(first - 1 <= border <= last + 1 for border in borders)
            for tag, first, last, _, _ in changes
        )

    def _without_added_ends(self, sample: _FoldedSample, end: int, trained: list[int]) -> list[int]:
        """ids[:end] without the end tokens that were added after trained replies because the template has none."""
        frames = [self._frame(sample, turn) for turn in trained]
        if all(frame.end or frame.other_end for frame in frames):
            return sample.ids[:end]
        eos = self._processor.tokenizer.traits.eos_id
        ends = {last - 1 for _, last in sample.spans if sample.ids[last - 1] == eos}
        return [token for i, token in enumerate(sample.ids[:end]) if i not in ends]

    def _reply(self, sample: _FoldedSample, turn: int, spans: list[_Span]) -> Iterator[Finding]:
        """Checks that the labels of a turn are its text and its end."""
        name, message = f"turn {turn + 1}", sample.messages[turn]
        if not spans:
            yield Finding.fault(NO_TEXT, f"{name}: nothing of {shown(message.text)} is trained on")
            return
        frame = self._frame(sample, turn)
        labels: list[int] = []
        for start, end in spans:
            labels += sample.labels[start:end]
        num_end = self._num_end(labels, frame)
        has_end = num_end > 0
        if self._end_of_turn and frame.other_end and not has_end:
            yield Finding.note(OTHER_END, f"{name}: the template writes another token there, which is not trained on")
        elif self._end_of_turn and not has_end:
            yield Finding.fault(NO_END, f"{name}: the token that ends it is not trained on")
        if has_end and not self._end_of_turn:
            yield Finding.fault(OUTSIDE, f"{name}: its end is trained on, although labels.end_of_turn is false")
        if self._end_of_turn and not frame.end and not frame.other_end:
            yield Finding.note(ADDED_END, f"{name}: the template has no end token, so the tokenizer's is added")
        labels = labels[: len(labels) - num_end]
        start = spans[0][0]
        before = sample.ids[max(0, start - _WINDOW) : start]
        text = self._processor.tokenizer.decode(before + labels)[len(self._decoded(tuple(before))) :]
        if not text.strip():
            yield Finding.fault(NO_TEXT, f"{name}: nothing of {shown(message.text)} is trained on")
            return
        written = self._as_written(sample, turn, frame, _normal(text))
        if written is not None and self._is_reasoned(sample, turn, text):
            return
        if written is not None:
            yield Finding.fault(REPLY, f"{name}: the labels say {shown(text)}, the assistant wrote {shown(written)}")
        elif message.text[:1].isspace() and text[len(frame.around[0]) :][:1].isspace():
            yield Finding.note(WHITE_SPACE, f"{name} begins with white space")

    def _num_end(self, labels: list[int], frame: ReplyFrame) -> int:
        """How many of the labels are the reply's end: the template's, or one that was added if it has none."""
        if frame.end:
            return len(frame.end) if tuple(labels[-len(frame.end) :]) == frame.end else 0
        return int(labels[-1] in self._processor.tokenizer.traits.eos_ids)

    def _as_written(self, sample: _FoldedSample, turn: int, frame: ReplyFrame, text: str) -> str | None:
        """None if `text` is what the template makes of the turn's text, otherwise what it should be."""
        if sample.messages[turn].calls:
            return self._calls_as_written(sample, turn, text)
        parts = texts_of(sample.messages[turn])
        *before, closing = frame.around
        expected = _normal("".join([around + part for around, part in zip(before, parts, strict=True)]))
        gap = closing[: len(closing) - len(closing.lstrip())] if frame.end else ""  # some end a reply on its own line
        if text in (expected, expected + gap):
            return None
        if all(part == part.strip() for part in parts):
            return expected
        rest = self._after_prompt(sample, turn, len(sample.messages))
        after = rest[len(text) :]
        closed = len(after) - len(after.lstrip()) == len(closing) - len(closing.lstrip())
        return None if rest.startswith(text) and closed and _squeezed(text) == _squeezed(expected) else expected

    def _is_reasoned(self, sample: _FoldedSample, turn: int, text: str) -> bool:
        """Whether `text` is a reply that begins with reasoning, which some templates space in their own way; a prompt
        may end with the `<think>` that opens it."""
        written = sample.messages[turn].text
        if CLOSE not in written:
            return False
        opening = (
            OPEN if self._inference.rendered(sample.conversation, turn, begun=True).rstrip().endswith(OPEN) else ""
        )
        return _squeezed(opening + text).removeprefix(OPEN) == _squeezed(written).removeprefix(OPEN)

    def _calls_as_written(self, sample: _FoldedSample, turn: int, text: str) -> str | None:
        """None if `text` is all that the template writes for a turn with calls, otherwise what it should be: the
        template may write more before it where the turn is the last."""
        rest, alone = (self._after_prompt(sample, turn, end) for end in (len(sample.messages), turn + 1))
        expected, _ = without_end(self._processor, alone)
        are_shown = all(call.name in text for call in sample.messages[turn].calls)
        return None if are_shown and rest.startswith(text) and expected.endswith(text) else expected

    def _after_prompt(self, sample: _FoldedSample, turn: int, end: int) -> str:
        """What the template writes for the turns from `turn` up to `end` after inference's prompt for `turn`."""
        prompt = self._inference.rendered(sample.conversation, turn, begun=True)
        return _normal(self._inference.rendered(sample.conversation, end)[len(prompt) :])

    def _frame(self, sample: _FoldedSample, turn: int) -> ReplyFrame:
        """What the template writes around the reply of `turn`: the same in every conversation of its form."""
        key = sample.form, turn
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            self._frames[key] = reply_frame(self._processor, form_of(sample.conversation), turn)
        return self._frames[key]


def _wrong_labels(ids: Ids, labels: Ids) -> Finding:
    wrong = ((labels != ids) & (labels != IGNORED)).nonzero()[0]
    return Finding.fault(NOT_ITSELF, f"{len(wrong)} labels are not the token they belong to, the first at {wrong[0]}")


def _spans(labels: Ids) -> list[_Span]:
    return [match.span() for match in _RUNS.finditer((labels != IGNORED).tobytes())]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _squeezed(text: str) -> str:
    return "".join(_normal(text).split())
