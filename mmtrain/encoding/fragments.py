"""Which stretches of a laid out conversation are encoded in one go, and which of them are trained on.

A fragment ends where inference's prompt ends, where a trained reply ends, at an image, and around a special token that
is literally in a text of the conversation. It also ends around the template's own special tokens that take nothing of
the text next to them, where every tokenizer parts its text anyway: what is between the conversation's texts is then the
same in every sample, and need not be encoded again.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmtrain.encoding.skeleton import Offset, Piece, Skeleton

FragmentKind = Literal["text", "literal", "image"]
Bounds = dict[int, list[tuple[int, int]]]
"""Of some pieces: (first character, last character + 1) of stretches in them."""
_CONSTANT = ("template", "image")


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
    constant: str | None = None
    """Its text, where that is the template's alone, the same in every conversation of the form."""
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

        Ordinary text does not change where the cuts are: conversations of one form share theirs.
        """
        literal = self._literal_specials(pieces)
        if literal or "" in [piece.text for piece in pieces]:
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
                is_constant = all(pieces[span.piece].kind in _CONSTANT for span in fragment.spans)
                constant = fragment.text(pieces) if is_constant else None
                found.append(replace(fragment, constant=constant, context=context or ""))
                is_template = fragment.kind == "text" and constant is not None
                context = self._context(context, constant or "") if is_template else None
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
        turns_on = {skeleton.replies[turn].border for turn in trained}
        turns_off: dict[Offset, bool] = {}
        for turn in trained:
            reply = skeleton.replies[turn]
            if reply.end is not None and self._end_of_turn:
                turns_off[reply.end] = False
            else:
                is_added = self._end_of_turn and not reply.other_end
                turns_off[Offset(reply.last_piece, len(pieces[reply.last_piece].text))] = is_added
        parted = set(self._around_parting(pieces))
        on = False
        run: list[Span] = []
        for kind, piece, first, last in _atoms(pieces, {*turns_on, *turns_off, *parted}, literal):
            start, end = Offset(piece, first), Offset(piece, last)
            span = Span(piece, first, last if last < len(pieces[piece].text) else None)
            if start in turns_on or start in parted or kind != "text":
                yield Fragment("text", tuple(run), on)
                run = []
            on = on or start in turns_on
            if kind == "text":
                run.append(span)
            else:
                yield Fragment(kind, (span,), on and kind != "image")
            if end in turns_off:
                yield Fragment("text", tuple(run), on, ends_turn=turns_off[end])
                run, on = [], False
            elif end in parted:
                yield Fragment("text", tuple(run), on)
                run = []
        yield Fragment("text", tuple(run), on)

    def _around_parting(self, pieces: Sequence[Piece]) -> Iterator[Offset]:
        """Before the first and after the last parting token of each of the template's pieces."""
        for i, piece in enumerate(pieces):
            matches = list(self._parting_tokens.finditer(piece.text)) if piece.kind == "template" else []
            if matches:
                yield Offset(i, matches[0].start())
                yield Offset(i, matches[-1].end())

    def _literal_specials(self, pieces: Sequence[Piece]) -> Bounds:
        """Where special tokens are in the conversation's texts, or arise where texts meet: these stay characters."""
        whole = "".join([piece.text for piece in pieces])
        matches = [match.span() for match in self._special_tokens.finditer(whole)]
        found: Bounds = {}
        start = 0
        for i, piece in enumerate(pieces):
            end = start + len(piece.text)
            if piece.kind == "text":
                for first, last in matches:
                    if first < end and last > start:
                        found.setdefault(i, []).append((max(first, start) - start, min(last, end) - start))
            start = end
        return found


def _atoms(pieces: Sequence[Piece], cuts: set[Offset], literal: Bounds) -> Iterator[tuple[FragmentKind, int, int, int]]:
    """(kind, piece, start, end) of the stretches between two cuts."""
    for i, piece in enumerate(pieces):
        if piece.kind == "image" or not piece.text:  # a turn can begin or end at a text that was trimmed away
            yield ("image" if piece.kind == "image" else "text"), i, 0, len(piece.text)
            continue
        spans = literal.get(i, [])
        bounds = {0, len(piece.text)} | {character for number, character in cuts if number == i}
        bounds |= {bound for span in spans for bound in span}
        for start, end in itertools.pairwise(sorted(bounds)):
            inside = any(span[0] <= start and end <= span[1] for span in spans)
            yield ("literal" if inside else "text"), i, start, end
