"""One sample for display: every token with its label and role, spans, images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from mmtrain.checks.findings import IGNORED
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.encode import Encoder, Traced
from mmtrain.encoding.image_processor import ImageTokens
from mmtrain.encoding.images import FoundImage
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation
from mmtrain.records.sources.place import Place

TokenKind = Literal["text", "special", "image"]


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token. `label` is unshifted: the token's id if it is supervised, otherwise -100."""

    position: int
    id: int
    text: str
    label: int
    role: str
    turn: int | None
    kind: TokenKind

    @property
    def supervised(self) -> bool:
        return self.label != IGNORED


@dataclass(frozen=True, slots=True)
class SpanView:
    """Consecutive tokens of one role and turn that are all supervised or all not: tokens[start:end]."""

    role: str
    turn: int | None
    start: int
    end: int
    text: str
    supervised: bool
    kind: TokenKind
    weight: float = 1.0
    """What each of its tokens counts in the loss, if they are trained on."""


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image and its first position among the tokens. Sizes are (width, height): of the file, and as used."""

    found: FoundImage
    tokens: ImageTokens
    start: int

    def row(self) -> dict[str, Any]:
        return {
            "path": self.found.name,
            "size": self.found.size,
            "used_size": self.tokens.used_size,
            "grid": self.tokens.grid,
            "start": self.start,
            "num_placeholders": self.tokens.num_placeholders,
        }


@dataclass(frozen=True, slots=True)
class SampleView:
    place: Place
    index: int
    """Of the sample among those that are looked at."""
    record: int
    turn: int | None
    """The turn that alone is trained on, where the record gives several samples."""
    conversation: Conversation
    tokens: tuple[TokenView, ...]
    spans: tuple[SpanView, ...]
    images: tuple[ImageView, ...]

    @property
    def name(self) -> str:
        """The number of its record, and after a dot that of the turn which alone is trained on."""
        return str(self.record) if self.turn is None else f"{self.record}.{self.turn + 1}"

    @property
    def num_supervised(self) -> int:
        return sum(token.supervised for token in self.tokens)

    def row(self, with_tokens: bool = False) -> dict[str, Any]:
        """The sample as one JSON object."""
        row: dict[str, Any] = {
            "source": str(self.place.file),
            "line": self.place.line,
            "index": self.record,
            **({} if self.turn is None else {"turn": self.turn}),
            "shape": self.conversation.shape,
            "num_tokens": len(self.tokens),
            "num_supervised": self.num_supervised,
            "images": [image.row() for image in self.images],
            "spans": [_fields(span) for span in self.spans],
        }
        if with_tokens:
            row["tokens"] = [{**_fields(token), "supervised": token.supervised} for token in self.tokens]
        return row


def view_sample(samples: StoredSamples, encoder: Encoder, index: int) -> SampleView:
    """The sample with this index, as it is stored. Raises SampleError if it cannot be used, or if `encoder` now gives
    other ids."""
    conversation, processor = samples.records.conversation(index), encoder.processor
    traced = encoder.trace(conversation, samples.encoded(index))
    tokens = tuple(_tokens(traced, processor, conversation))
    found = traced.encoded.images
    of_images = processor.image_tokens([span.image.size for span in found])
    images = tuple(ImageView(span.image, tokens, span.start) for span, tokens in zip(found, of_images, strict=True))
    weights = dict(
        zip(np.flatnonzero(traced.encoded.supervised).tolist(), traced.encoded.token_weights.tolist(), strict=True)
    )
    spans = tuple(_spans(tokens, {image.start for image in images}, processor, weights))
    records = samples.records
    return SampleView(
        samples.place(index), index, records.record(index), records.turn(index), conversation, tokens, spans, images
    )


def _tokens(traced: Traced, processor: ChatProcessor, conversation: Conversation) -> Iterator[TokenView]:
    in_image = {p for span in traced.encoded.images for p in range(span.start, span.start + span.length)}
    for position, (token_id, owner) in enumerate(zip(traced.encoded.ids.tolist(), traced.owners, strict=True)):
        piece = traced.pieces[owner] if owner >= 0 else None
        is_content = piece is not None and piece.kind != "template"
        kind: TokenKind = "text"
        if position in in_image:
            kind = "image"
        elif processor.tokenizer.is_special(token_id):
            kind = "special"
        yield TokenView(
            position,
            token_id,
            processor.tokenizer.decode([token_id]),
            token_id if traced.encoded.supervised[position] else IGNORED,
            conversation.messages[piece.turn].role if piece is not None and is_content else "template",
            piece.turn if piece is not None else None,
            kind,
        )


def _spans(
    tokens: tuple[TokenView, ...], images: set[int], processor: ChatProcessor, weights: Mapping[int, float]
) -> Iterator[SpanView]:
    """Consecutive tokens of the same role, turn and supervision are one span; each image is a separate span. `weights`
    by the position of the supervised token."""
    starts = [0] + [b.position for a, b in pairwise(tokens) if _differ(a, b) or b.position in images]
    for start, end in pairwise([*starts, len(tokens)]):
        first = tokens[start]
        text = processor.tokenizer.decode([token.id for token in tokens[start:end]])
        kind: TokenKind = "image" if first.kind == "image" else "text"
        yield SpanView(first.role, first.turn, start, end, text, first.supervised, kind, weights.get(start, 1.0))


def _differ(a: TokenView, b: TokenView) -> bool:
    return (a.role, a.turn, a.supervised, a.kind == "image") != (b.role, b.turn, b.supervised, b.kind == "image")


def _fields(view: Any) -> dict[str, Any]:
    return {name: getattr(view, name) for name in view.__slots__}
