"""A conversation as token ids, with the supervised flag made while they are laid out.

Supervised is what the model must write: from the place where inference's prompt ends to the end of the answer's
words, and the token that ends the turn. A span of a picture is one indivisible run of ids.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.data.chat import Conversation, Message, SampleError
from mmtrain.data.images import Picture, find_picture
from mmtrain.data.layout import Layout, Piece, Skeleton
from mmtrain.data.processor import ChatProcessor


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """A picture's run of ids in a sample: ids[start : start + length]."""

    picture: Picture
    start: int
    length: int
    num_placeholders: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as the model gets it."""

    ids: npt.NDArray[np.int32]
    """(num_tokens,)"""
    supervised: npt.NDArray[np.bool_]
    """(num_tokens,) True where the token is learned. Never true for the first token or in a picture's span."""
    images: tuple[ImageSpan, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised.sum())


@dataclass(frozen=True, slots=True)
class _Segment:
    """Text that is encoded in one go, or a picture (text is None)."""

    text: str | None
    supervised: bool = False
    literal: bool = False
    ends_turn: bool = False


class Encoder:
    """Turns conversations into ids and supervised flags for one model and one choice of labels."""

    def __init__(self, processor: ChatProcessor, train_on: str = "assistant", end_of_turn: bool = True) -> None:
        self.processor = processor
        self._layout = Layout(processor)
        self._train_on = train_on
        self._end_of_turn = end_of_turn

    def encode(self, conversation: Conversation, root: Path) -> Encoded:
        """`root` is the folder of the pictures. Raises SampleError with the reason a sample cannot be used."""
        pictures = [find_picture(image, root) for image in conversation.images]
        if pictures and self.processor.image_token is None:
            raise SampleError("the sample has pictures and this model takes none")
        pieces, skeleton = self._layout.lay_out(conversation)
        trained = self._trained_turns(conversation.messages, skeleton)
        ids: list[int] = list(self._prefix(pieces))
        num_prefix = len(ids)
        supervised = [False] * num_prefix
        images: list[ImageSpan] = []
        for segment in self._segments(pieces, skeleton, trained):
            if segment.text is None:
                picture = pictures[len(images)]
                tokens = self.processor.image_tokens(picture.size)
                images.append(ImageSpan(picture, len(ids), len(tokens.ids), tokens.num_placeholders))
                new = list(tokens.ids)
            else:
                new = self._encode(segment, ids[-1] if len(ids) > num_prefix else None)
            ids += new
            supervised += [segment.supervised] * len(new)
        supervised[0] = False
        if not any(supervised):
            raise SampleError("no token of it is learned")
        return Encoded(np.array(ids, np.int32), np.array(supervised, np.bool_), tuple(images))

    def _trained_turns(self, messages: tuple[Message, ...], skeleton: Skeleton) -> list[int]:
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if self._train_on == "last":
            turns = turns[-1:]
        turns = [turn for turn in turns if messages[turn].train]
        if not turns:
            raise SampleError("there is no assistant turn to learn from")
        if turns[0] == 0:
            raise SampleError("the conversation begins with the assistant: there is no prompt to answer")
        for turn in turns:
            if turn not in skeleton.answers:
                raise SampleError(
                    "the model's chat template rewrites earlier turns, so they cannot all be learned in one sample: "
                    "set labels.train_on to last"
                )
        return turns

    def _prefix(self, pieces: list[Piece]) -> list[int]:
        bos = self.processor.tokenizer.bos_token
        return [] if bos and pieces[0].text.startswith(bos) else self.processor.prefix_ids

    def _segments(self, pieces: list[Piece], skeleton: Skeleton, trained: list[int]) -> Iterator[_Segment]:
        """The pieces joined into the longest runs that are encoded in one go.

        A run ends where inference's prompt ends, where a trained answer ends, at a picture, and around a special
        token that stands literally in the words.
        """
        turns_on = {skeleton.answers[turn].border for turn in trained}
        turns_off: dict[tuple[int, int], bool] = {}
        for turn in trained:
            answer = skeleton.answers[turn]
            words_end = (answer.words_end, len(pieces[answer.words_end].text))
            if answer.end is not None and self._end_of_turn:
                turns_off[answer.end] = False
            else:
                turns_off[words_end] = self._end_of_turn
        on = False
        buffer = ""
        for text, kind, at in self._atoms(pieces, {*turns_on, *turns_off}):
            if at in turns_on or kind != "text":
                yield _Segment(buffer, on)
                buffer = ""
            on = on or at in turns_on
            if kind == "image":
                yield _Segment(None)
            elif kind == "literal":
                yield _Segment(text, on, literal=True)
            else:
                buffer += text
            behind = (at[0], at[1] + len(text))
            if behind in turns_off:
                yield _Segment(buffer, on, ends_turn=turns_off[behind])
                buffer, on = "", False
        yield _Segment(buffer, on)

    def _atoms(self, pieces: list[Piece], cuts: set[tuple[int, int]]) -> Iterator[tuple[str, str, tuple[int, int]]]:
        """(text, kind, place) of each stretch between cuts; kind is text, literal or image."""
        literal = self._literal_specials(pieces)
        for i, piece in enumerate(pieces):
            if piece.kind == "image":
                yield piece.text, "image", (i, 0)
                continue
            if not piece.text:  # words that the template trimmed away: a turn can begin or end here
                yield "", "text", (i, 0)
                continue
            bounds = {0, len(piece.text)} | {character for number, character in cuts if number == i}
            spans = literal.get(i, [])
            bounds |= {bound for span in spans for bound in span}
            ordered = sorted(bounds)
            for start, end in itertools.pairwise(ordered):
                inside = any(span[0] <= start and end <= span[1] for span in spans)
                yield piece.text[start:end], "literal" if inside else "text", (i, start)

    def _literal_specials(self, pieces: list[Piece]) -> dict[int, list[tuple[int, int]]]:
        """Where special tokens stand in words, or come about where words meet: these stay characters."""
        whole = "".join(piece.text for piece in pieces)
        found: dict[int, list[tuple[int, int]]] = {}
        matches = list(self.processor.special_tokens.finditer(whole))
        start = 0
        for i, piece in enumerate(pieces):
            end = start + len(piece.text)
            if piece.kind == "words":
                for match in matches:
                    if match.start() < end and match.end() > start:
                        found.setdefault(i, []).append(
                            (max(match.start(), start) - start, min(match.end(), end) - start)
                        )
            start = end
        return found

    def _encode(self, segment: _Segment, after: int | None) -> list[int]:
        ids = self.processor.encode(segment.text or "", after, segment.literal)
        if segment.ends_turn:
            eos = self.processor.tokenizer.eos_token_id
            if eos is None:
                raise SampleError(
                    "neither the chat template nor the tokenizer has an end token: set labels.end_of_turn to false"
                )
            ids = [*ids, eos]
        return ids
