"""The tokens of a sample as the page draws them: in turns, each token with its share of the text."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from mmtrain.inspect_labels.view import ImageView, SampleView, SpanView, TokenView
from mmtrain.records.chat import Message

JOINERS = "\u200c\u200d"
"""They shape Persian words and join emoji, and have no shape of their own."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A token and the characters drawn for it.

    `name` describes a token that is not whole characters, such as one byte of an emoji; empty for all others.
    """

    token: TokenView
    text: str
    name: str = ""

    @property
    def shows_all(self) -> bool:
        """Whether the drawn text is the token's text, with every character visible."""
        return not self.name and self.text == self.token.text and all(map(is_visible, self.text))


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens of one span and one turn, or an image."""

    span: SpanView
    turn: int
    cells: tuple[Cell, ...]
    image: ImageView | None = None

    @property
    def num_tokens(self) -> int:
        return self.span.end - self.span.start if self.image else len(self.cells)


@dataclass(frozen=True, slots=True)
class Turn:
    number: int
    message: Message
    runs: tuple[TokenRun, ...]


def turns_of(view: SampleView) -> tuple[Turn, ...]:
    """All tokens and images of a sample by turns, in their order."""
    by_turn = groupby(_runs(view), key=lambda run: run.turn)
    return tuple(Turn(turn, view.conversation.messages[turn], tuple(runs)) for turn, runs in by_turn)


def is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    return character in JOINERS or (category[0] != "C" and category not in ("Zl", "Zp"))


def _runs(view: SampleView) -> Iterator[TokenRun]:
    turns = _turn_numbers(view.tokens)
    images = {image.start: image for image in view.images}
    for span in view.spans:
        if span.start in images:
            yield TokenRun(span, turns[span.start], (), images[span.start])
            continue
        cells = divide_text(view.tokens[span.start : span.end], span.text)
        for turn, group in groupby(cells, key=lambda cell: turns[cell.token.position]):
            yield TokenRun(span, turn, tuple(group))


def _turn_numbers(tokens: Sequence[TokenView]) -> list[int]:
    """The turn in which each token is shown.

    This is for display only. The tokens that a template writes between two turns are divided at the token that also
    begins the whole text (`<|im_start|>`), or else at the second special token, which follows the end of the turn.
    """
    turns: list[int] = []
    first = next((token.turn for token in tokens if token.turn is not None), 0)
    for token in tokens:
        turns.append(token.turn if token.turn is not None else turns[-1] if turns else first)
    for before, after in pairwise([token for token in tokens if token.role != "template"]):
        if turns[after.position] != turns[before.position] + 1:
            continue
        specials = [t for t in tokens[before.position + 1 : after.position] if t.kind == "special"]
        opening = [t.position for t in specials if t.id == tokens[0].id][-1:] or [t.position for t in specials[1:2]]
        for border in opening:
            for position in range(before.position + 1, after.position):
                turns[position] = turns[before.position if position < border else after.position]
    return turns


def divide_text(tokens: Sequence[TokenView], text: str) -> Iterator[Cell]:
    """Divide `text`, which the tokens decode to together, among them; no character is lost or repeated.

    A token decoded alone may give less: an incomplete character, or a word without the space before it.
    """
    at, waiting = 0, list[TokenView]()
    for token in tokens:
        found = text.find(token.text, at) if token.text and "\ufffd" not in token.text else -1
        if found < 0 or (not waiting and text[at:found].strip()):
            waiting.append(token)
            continue
        if waiting:
            yield from _together(waiting, text[at:found])
            at, waiting = found, []
        end = found + len(token.text)
        yield Cell(token, text[at:end])
        at = end
    if waiting:
        yield from _together(waiting, text[at:])


def _together(tokens: list[TokenView], text: str) -> Iterator[Cell]:
    """Tokens that are not whole characters: grouped by character if each is one byte, otherwise all in one group."""
    pieces = clusters(text) if len(text.encode(errors="replace")) == len(tokens) else [text]
    at = 0
    for piece in pieces:
        end = at + len(piece.encode(errors="replace")) if len(pieces) > 1 else len(tokens)
        for number, token in enumerate(tokens[at:end], start=1):
            name = f"part {number} of {end - at} of “{piece}”" if end - at > 1 else piece
            yield Cell(token, piece if number == 1 else "", name)
        at = end


def clusters(text: str) -> list[str]:
    """`text` in pieces that can be drawn separately: an accent stays on its letter, joined letters stay joined."""
    pieces: list[str] = []
    for character in text:
        before = pieces[-1][-1] if pieces else ""
        joined = character in JOINERS or before in JOINERS or unicodedata.category(character)[0] == "M"
        if before and (joined or unicodedata.bidirectional(before) == unicodedata.bidirectional(character) == "AL"):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces
