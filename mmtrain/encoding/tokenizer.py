"""The model's tokenizer: ids of text in pieces, as they are in the middle of a longer text."""

import copy
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.encoding.fast_template import (
    inference_encoder,
    text_decoder,
    text_encoder,
    with_large_cache,
    without_padding,
)
from mmtrain.encoding.segments import Known, SegmentEncoder
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown

_ANCHORS = ("", "\n", ":", "a")


@dataclass(frozen=True, slots=True)
class TokenizerTraits:
    """What is found out about a tokenizer, once."""

    added: Mapping[int, str]
    """Every token that was added to the vocabulary, by its id."""
    eos_id: int | None
    """The tokenizer's own end token."""
    eos_ids: frozenset[int]
    """Every token that ends generation."""
    pad_id: int
    bos: str | None
    special_tokens: re.Pattern[str]
    """Matches every token that text must never become."""
    special_ids: frozenset[int]
    parting_tokens: re.Pattern[str]
    """Matches the special tokens that take nothing of the text around them."""
    swallowing_ids: frozenset[int]
    """Tokens that take the white space after them."""
    anchors: tuple[str, ...]
    """Texts, shortest first, after which a text gets the ids that it has in the middle of a longer one."""
    prefix_ids: tuple[int, ...]
    """What inference puts before any text (such as BOS) and the template does not."""
    processor_text: str
    """The text of what in it the family's processor puts there, not the tokenizer."""


def probe_tokenizer(
    wrapped: Any, encode: Callable[[str], list[int]], eos_ids: frozenset[int], family: Any | None
) -> TokenizerTraits:
    """The traits of `wrapped`, a tokenizer of transformers, whose ids of a text are `encode(text)`.

    `eos_ids` end generation besides the tokenizer's own end token; `family`: the processor of a model with images.
    Raises UserError where a text cannot be encoded in pieces.
    """
    tokens = wrapped.added_tokens_decoder
    added = {id_: token.content for id_, token in tokens.items()}
    eos_ids = eos_ids | ({wrapped.eos_token_id} - {None})
    specials = {token.content for token in tokens.values() if token.special}
    specials |= {added[id_] for id_ in eos_ids if id_ in added} | (set() if family is None else {family.image_token})
    special_tokens = _any_of(specials)
    prefix, processor_text = ([], "") if family is None else _find_prefix(wrapped, family, encode("word"))
    parting = {t.content for t in tokens.values() if not (t.lstrip or t.rstrip or t.single_word)}
    return TokenizerTraits(
        added=added,
        eos_id=wrapped.eos_token_id,
        eos_ids=eos_ids,
        pad_id=int(wrapped.pad_token_id or 0),
        bos=wrapped.bos_token,
        special_tokens=special_tokens,
        special_ids=frozenset(id_ for id_, token in added.items() if special_tokens.fullmatch(token)),
        parting_tokens=_any_of(parting & specials),
        swallowing_ids=frozenset(id_ for id_, token in tokens.items() if token.rstrip),
        anchors=_find_anchors(encode),
        prefix_ids=tuple(prefix),
        processor_text=processor_text,
    )


def _find_anchors(encode: Callable[[str], list[int]]) -> tuple[str, ...]:
    found = []
    for anchor in _ANCHORS:
        head = encode(anchor)
        if all(
            encode("so:\n" + anchor) + encode(anchor + text)[len(head) :] == encode("so:\n" + anchor + text)
            for text in ("word", " word", "Word 12")
        ):
            found.append(anchor)
    if found:
        return tuple(found)
    raise UserError("the tokenizer cannot encode a text in pieces: it is not supported")


def _find_prefix(wrapped: Any, family: Any, bare: list[int]) -> tuple[list[int], str]:
    """What inference puts before the ids `bare` of "word", and as text what of it is not the tokenizer's: some
    processors put a token before every text."""
    own = _before(bare, wrapped.encode("word", add_special_tokens=True))
    try:
        prefix = _before(bare, list(family(text=["word"])["input_ids"][0]))
    except Exception:  # a family that takes no text without an image can raise anything
        prefix = own
    return prefix, wrapped.decode(prefix[len(own) :]) if prefix[: len(own)] == own else ""


def _before(bare: list[int], whole: list[int]) -> list[int]:
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    return whole[: whole.index(bare[0]) if start is None else start]


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing where there is none."""
    return re.compile("|".join(sorted(map(re.escape, texts), key=len, reverse=True)) or r"(?!)")


class Tokenizer:
    """Turns text into ids and back, as inference does."""

    def __init__(self, wrapped: Any, eos_ids: frozenset[int], family: Any | None) -> None:
        """See `probe_tokenizer`; `wrapped` is shared with nobody that uses it at the same time."""
        self.wrapped = with_large_cache(without_padding(wrapped))
        """The tokenizer of transformers."""
        # whose own warning of a long text says nothing of `data.max_length`, which decides
        self.wrapped.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        # `split_special_tokens` is a state of the tokenizer, which threads share: each of the two keeps one state
        literal = copy.deepcopy(self.wrapped)
        self._encoders = [text_encoder(self.wrapped, literal=False), text_encoder(literal, literal=True)]
        self.traits = probe_tokenizer(self.wrapped, self._encoders[False], eos_ids, family)
        self._head = functools.cache(self._encode)
        self._decode = text_decoder(self.wrapped)
        self.encode_for_inference = inference_encoder(self.wrapped)
        """From whole texts, and whether special tokens are added to each, to the ids that inference makes of them."""
        self.encode_in_segments = SegmentEncoder(self.encode_for_inference, self.traits.parting_tokens)
        """The same, with the ids of texts that are known."""

    def encode(
        self, text: str, after: int | None, literal: bool = False, known: Known | None = None, context: str = ""
    ) -> list[int]:
        """Ids of `text` as they are in the middle of a longer text, after the token `after` (None: at the start).

        `literal`: special tokens in the text are ordinary characters. Tokenizers that put a space before whatever
        they are given (SentencePiece) get something to begin with that is taken off again. `known` is what
        `encode_batch` gave of texts among which this one may be, after the `anchor` of `context`: the text between the
        last token that takes nothing of what follows it, and this text.
        """
        if not text:
            return []
        _, ids = self._after_anchor(text, after, literal, known or {}, context)
        if literal and len(text) > 1 and not self.traits.special_ids.isdisjoint(ids):
            # an ordinary piece of the vocabulary that is a special token too: take it apart
            return self.encode(text[0], after, literal=True) + self.encode(text[1:], ids[0], literal=True)
        return ids

    def anchor(self, context: str) -> str:
        """What `encode` puts before a text first, and takes off again: the context, so that the ids of both are those
        that inference makes of them, where the tokenizer puts nothing of its own before a text."""
        return self.traits.anchors[0] or context

    def encode_batch(self, texts: Collection[str]) -> Known:
        """The ids of each text with its anchor, in half the time; none without a native part."""
        native = getattr(self.wrapped, "backend_tokenizer", None)
        if native is None:
            return {}
        found = native.encode_batch_fast(list(texts), add_special_tokens=False)
        return {text: one.ids for text, one in zip(texts, found, strict=True)}

    def last_characters(self, text: str, after: int | None) -> list[int]:
        """The position in `text` of the last character that each of the ids of `encode(text, after)` stands for.

        The last, because a token that takes the space before a word belongs to the word.
        """
        anchor, ids = self._after_anchor(text, after, literal=False, known={})
        made = self.wrapped(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        positions = [max(0, start, end - 1) - len(anchor) for start, end in made["offset_mapping"]]
        return positions[len(positions) - len(ids) :]

    def is_special(self, token_id: int) -> bool:
        return token_id in self.traits.added

    def id_of(self, token: str) -> int:
        """-1 where the vocabulary lacks it."""
        found = self.wrapped.convert_tokens_to_ids(token)
        return -1 if found is None else int(found)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(list(ids))

    def _after_anchor(
        self, text: str, after: int | None, literal: bool, known: Known, context: str = ""
    ) -> tuple[str, list[int]]:
        """An anchor that leaves `text` as it would be in the middle, and the ids of `text` after it."""
        traits = self.traits
        anchors: Sequence[str] = traits.anchors
        if after is None:
            anchors = [""]
        elif after in traits.added and not literal and (after in traits.swallowing_ids or anchors[0]):
            anchors = [traits.added[after]]
        elif context and not literal:
            anchors = [self.anchor(context), *anchors]
        for anchor in anchors:
            head, ids = self._head(anchor, literal), known.get(anchor + text) or self._encode(anchor + text, literal)
            if ids[: len(head)] == head:
                return anchor, ids[len(head) :]
        raise SampleError(f"the tokenizer joins {shown(text)} with whatever is before it")

    def _encode(self, text: str, literal: bool = False) -> list[int]:
        return self._encoders[literal](text)
