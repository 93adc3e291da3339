"""What a chat template writes around the texts of a conversation, in pieces, and the texts put into it."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmtrain.encoding.stand_ins import Form, TurnForm, numbered, stand_in
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown

PieceKind = Literal["template", "text", "calls", "image"]


class Piece(NamedTuple):
    """A stretch of the rendered text: the template's own, a text or calls of a turn, or the placeholder of an image."""

    kind: PieceKind
    text: str
    turn: int


class Offset(NamedTuple):
    """A character of a piece, by the numbers of both."""

    piece: int
    character: int


@dataclass(frozen=True, slots=True)
class ReplyBounds:
    """Where a reply is in the pieces of a skeleton."""

    border: Offset
    """Where inference's prompt ends; the model writes what follows."""
    last_piece: int
    """The last of its texts and calls."""
    end: Offset | None
    """After the token that ends the turn; None where the template writes none."""
    other_end: bool
    """Whether the template ends a reply that others follow by another token, which does not stop generation: nothing of
    its end is trained on there, and nothing is put in its place."""


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """What the template writes for a form of conversation; a piece of a turn's text has its number in its place."""

    pieces: tuple[Piece, ...]
    replies: dict[int, ReplyBounds]
    """By turn."""


def in_skeleton(piece: Piece) -> str:
    """What a piece of a skeleton is in the rendered text: for a number its stand-in."""
    return stand_in(int(piece.text)) if piece.kind == "text" else piece.text


def starts_of(pieces: list[Piece]) -> list[int]:
    """Where each piece begins in the skeleton's text, and where the last one ends."""
    return list(itertools.accumulate((len(in_skeleton(piece)) for piece in pieces), initial=0))


def is_whole(form: TurnForm, kinds: list[PieceKind]) -> bool:
    """Whether the pieces of a turn have all its texts: templates leave the reasoning of earlier turns out."""
    return kinds.count("text") == form.num_texts and (form.num_texts > 0 or "calls" in kinds)


def check_shown(pieces: Sequence[Piece], form: Form, first: int) -> None:
    """Raises SampleError unless the texts from turn `first` on are among the pieces, and none of all twice."""
    seen = [int(piece.text) for piece in pieces if piece.kind == "text"]
    missing = [turn for n, (turn, is_reasoning) in enumerate(numbered(form)) if n not in seen and not is_reasoning]
    said = "the model's chat template does not show every text of the conversation exactly once"
    if lost := [turn for turn in missing if turn >= first]:
        raise SampleError(f"{said}: one of turn {lost[0] + 1} ({form.turns[lost[0]].role}) is missing")
    if len(seen) > len(set(seen)):
        raise SampleError(said)


def hidden_reasoning(pieces: list[Piece], form: Form, turn: int) -> int | None:
    """The stand-in for the reasoning of a turn that is not among the pieces."""
    seen = {piece.text for piece in pieces if piece.kind == "text"}
    numbers = (number for number, found in enumerate(numbered(form)) if found == (turn, True))
    return next((number for number in numbers if str(number) not in seen), None)


def filled(skeleton: Sequence[Piece], texts: Sequence[str], whole: str) -> list[Piece]:
    """The pieces with texts in the place of numbers. Raises SampleError unless they are the rendered text `whole`."""
    pieces, at = [], 0
    for i, piece in enumerate(skeleton):
        if piece.kind == "text":
            following = skeleton[i + 1].text if i + 1 < len(skeleton) and skeleton[i + 1].kind != "text" else ""
            piece = Piece("text", _as_rendered(texts[int(piece.text)], following, whole, at), piece.turn)
        elif not whole.startswith(piece.text, at):
            raise SampleError(f"the model's chat template rewrites the conversation near {shown(whole[at : at + 40])}")
        pieces.append(piece)
        at += len(piece.text)
    if at != len(whole):
        raise SampleError(f"the model's chat template adds {shown(whole[at : at + 40])} to the conversation")
    return pieces


def _as_rendered(text: str, following: str, whole: str, at: int) -> str:
    """The text as it is in `whole` at `at`: as written, trimmed, or escaped as in JSON."""
    if whole.startswith(text + following, at):
        return text
    for variant in _variants(text):
        if whole.startswith(variant + following, at):
            return variant
    raise SampleError(f"the model's chat template changes the text {shown(text, 40)}")


def _variants(text: str) -> Iterator[str]:
    yield from (strip(text, of) for of in (None, "\n") for strip in (str.lstrip, str.rstrip, str.strip))
    yield json.dumps(text, ensure_ascii=False)[1:-1]
