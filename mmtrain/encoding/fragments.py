"""Which stretches of a laid out conversation are encoded in one go, and which of them are trained on.

A fragment ends where inference's prompt ends, where a trained answer ends, at an image, and around a special token that
stands literally in the words. It also ends around the template's own special tokens that take nothing of the text
next to them, where every tokenizer parts its text anyway: what stands between the words is the same in every sample
then, and need not be encoded again.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmtrain.encoding.skeleton import Piece, Skeleton

FragmentKind = Literal["text", "literal", "image"]
Bounds = dict[int, list[tuple[int, int]]]
"""Of some pieces: (first character, last character + 1) of stretches in them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of one piece: pieces[piece].text[start:end]. No end: to the end of the piece."""

    piece: int
    start: int
    end: int | None

    def text(self, pieces: Sequence[Piece]) -> str:
        return pieces[self.piece].text[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Spans that are encoded in one go: text, or one literal special token, or one image."""

    kind: FragmentKind
    spans: tuple[Span, ...]
    supervised: bool = False
    ends_turn: bool = False
    """An end token that the template lacks is put after it."""
    has_words: bool = True
    """False: its text is the template's alone, the same in every conversation of the form."""
    context: str = ""
    """What the template writes between the last parting token and it, where nothing else is there."""

    def text(self, pieces: Sequence[Piece]) -> str:
        return "".join([span.text(pieces) for span in self.spans])


class Fragmenter:
    """Cuts conversations for one model and one choice of labels."""

    def __init__(self, special_tokens: re.Pattern[str], parting_tokens: re.Pattern[str], end_of_turn: bool) -> None:
        self._special_tokens, self._parting_tokens = special_tokens, parting_tokens
        self._end_of_turn = end_of_turn
        self._of_form = functools.lru_cache(maxsize=4096)(self._of_skeleton)

    def cut(self, pieces: Sequence[Piece], skeleton: Skeleton, trained: tuple[int, ...]) -> Sequence[Fragment]:
        """The fragments of `pieces`, which follow `skeleton`; `trained` are the turns that are trained on.

        Ordinary words do not change where the cuts lie: conversations of one form share theirs.
        """
        literal = self._literal_specials(pieces)
        if literal or any(not piece.text for piece in pieces):
            return self._non_empty(pieces, skeleton, trained, literal)
        return self._of_form(skeleton, trained)

    def _of_skeleton(self, skeleton: Skeleton, trained: tuple[int, ...]) -> tuple[Fragment, ...]:
        return self._non_empty(skeleton.pieces, skeleton, trained, {})

    def _non_empty(
        self, pieces: Sequence[Piece], skeleton: Skeleton, trained: tuple[int, ...], literal: Bounds
    ) -> tuple[Fragment, ...]:
        found: list[Fragment] = []
        context: str | None = None
        for fragment in self._fragments(pieces, skeleton, trained, literal):
            if fragment.spans or fragment.ends_turn:
                has_words = any(pieces[span.piece].kind in ("words", "calls") for span in fragment.spans)
                found.append(replace(fragment, has_words=has_words, context=context or ""))
                is_template = fragment.kind == "text" and not has_words
                context = self._context(context, fragment.text(pieces)) if is_template else None
        return tuple(found)

    def _context(self, context: str | None, text: str) -> str | None:
        """The context of what follows `text`, which is the template's and has the context `context`; None: there is
        something else since the last parting token."""
        ends = [match.end() for match in self._parting_tokens.finditer(text)]
        if ends:
            return text[ends[-1] :]
        return None if context is None else context + text

    def _fragments(
        self, pieces: Sequence[Piece], skeleton: Skeleton, trained: tuple[int, ...], literal: Bounds
    ) -> Iterator[Fragment]:
        turns_on = {skeleton.answers[turn].border for turn in trained}
        turns_off: dict[tuple[int, int], bool] = {}
        for turn in trained:
            answer = skeleton.answers[turn]
            if answer.end is not None and self._end_of_turn:
                turns_off[answer.end] = False
            else:
                is_added = self._end_of_turn and not answer.other_end
                turns_off[answer.words_end, len(pieces[answer.words_end].text)] = is_added
        parted = set(self._around_parting(pieces))
        on = False
        run: list[Span] = []
        for kind, piece, start, end in _atoms(pieces, {*turns_on, *turns_off, *parted}, literal):
            span = Span(piece, start, end if end < len(pieces[piece].text) else None)
            if (piece, start) in turns_on or (piece, start) in parted or kind != "text":
                yield Fragment("text", tuple(run), on)
                run = []
            on = on or (piece, start) in turns_on
            if kind == "text":
                run.append(span)
            else:
                yield Fragment(kind, (span,), on and kind != "image")
            if (piece, end) in turns_off:
                yield Fragment("text", tuple(run), on, ends_turn=turns_off[piece, end])
                run, on = [], False
            elif (piece, end) in parted:
                yield Fragment("text", tuple(run), on)
                run = []
        yield Fragment("text", tuple(run), on)

    def _around_parting(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
        """(piece, character) before the first and after the last parting token of each of the template's pieces."""
        for i, piece in enumerate(pieces):
            matches = list(self._parting_tokens.finditer(piece.text)) if piece.kind == "template" else []
            if matches:
                yield i, matches[0].start()
                yield i, matches[-1].end()

    def _literal_specials(self, pieces: Sequence[Piece]) -> Bounds:
        """Where special tokens stand in words, or come about where words meet: these stay characters."""
        whole = "".join([piece.text for piece in pieces])
        matches = [match.span() for match in self._special_tokens.finditer(whole)]
        found: Bounds = {}
        start = 0
        for i, piece in enumerate(pieces):
            end = start + len(piece.text)
            if piece.kind == "words":
                for first, last in matches:
                    if first < end and last > start:
                        found.setdefault(i, []).append((max(first, start) - start, min(last, end) - start))
            start = end
        return found


def _atoms(
    pieces: Sequence[Piece], cuts: set[tuple[int, int]], literal: Bounds
) -> Iterator[tuple[FragmentKind, int, int, int]]:
    """(kind, piece, start, end) of the stretches between two cuts."""
    for i, piece in enumerate(pieces):
        if piece.kind == "image" or not piece.text:  # a turn can begin or end at words that were trimmed away
            yield ("image" if piece.kind == "image" else "text"), i, 0, len(piece.text)
            continue
        spans = literal.get(i, [])
        bounds = {0, len(piece.text)} | {character for number, character in cuts if number == i}
        bounds |= {bound for span in spans for bound in span}
        for start, end in itertools.pairwise(sorted(bounds)):
            inside = any(span[0] <= start and end <= span[1] for span in spans)
            yield ("literal" if inside else "text"), i, start, end
