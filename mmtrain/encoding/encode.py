"""A conversation as token ids, with the supervised flag made while they are laid out.

Supervised is what the model must write: from the end of inference's prompt to the end of the reply, and the token that
ends the turn. An image's span is one indivisible run of ids.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmtrain.encoding.fragments import Fragment, Fragmenter
from mmtrain.encoding.images import FoundImage, Roots, find_image
from mmtrain.encoding.layout import Layout
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.segments import Known
from mmtrain.encoding.skeleton import Piece
from mmtrain.records.chat import Conversation, Message, SampleError


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """An image's run of ids in a sample: ids[start : start + length]."""

    image: FoundImage
    start: int
    length: int
    num_placeholders: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as the model gets it."""

    ids: npt.NDArray[np.int32]
    """(num_tokens,)"""
    supervised: npt.NDArray[np.bool_]
    """(num_tokens,) True where the token is trained on. Never true for the first token or in an image's span."""
    images: tuple[ImageSpan, ...]
    weights: tuple[float, ...] = ()
    """For each run of supervised tokens, which is a turn, what each of its tokens counts in the loss. Empty: 1."""

    @property
    def token_weights(self) -> npt.NDArray[np.float32]:
        """(num_supervised,) what each supervised token counts in the loss."""
        if not self.weights:
            return np.ones(self.num_supervised, np.float32)
        return np.repeat(np.array(self.weights, np.float32), self.run_lengths)

    @property
    def run_lengths(self) -> npt.NDArray[np.int64]:
        """The length of each run of supervised tokens."""
        flags = np.concatenate([[False], self.supervised, [False]])
        borders = np.flatnonzero(flags[1:] != flags[:-1])
        return borders[1::2] - borders[::2]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.supervised))


@dataclass(frozen=True, slots=True)
class Traced:
    """An encoded sample with where each of its ids comes from."""

    encoded: Encoded
    pieces: tuple[Piece, ...]
    owners: tuple[int, ...]
    """(num_tokens,) the piece that each id comes from, -1 for what no text stands for: BOS from the tokenizer, and
    an end of turn that the template lacks."""


class LaidOut(NamedTuple):
    """A conversation as pieces of text."""

    pieces: list[Piece]
    fragments: Sequence[Fragment]
    texts: list[str]
    """Of each fragment."""
    weights: tuple[float, ...]
    """Of its trained turns; none where all are 1."""

    @property
    def own_texts(self) -> list[tuple[Fragment, str]]:
        """The fragments that are encoded and are not the template's alone, with their texts."""
        texts = zip(self.fragments, self.texts, strict=True)
        return [(one, text) for one, text in texts if one.constant is None and one.kind == "text"]


class Encoder:
    """Turns conversations into ids and supervised flags for one model and one choice of labels."""

    def __init__(self, processor: ChatProcessor, train_on: str = "assistant", end_of_turn: bool = True) -> None:
        self.processor = processor
        self._layout = Layout(processor)
        traits = processor.tokenizer.traits
        self._fragmenter = Fragmenter(traits.special_tokens, traits.parting_tokens, end_of_turn)
        self._constant = functools.lru_cache(maxsize=4096)(processor.tokenizer.encode)
        self._train_on = train_on

    def sequences(self, conversation: Conversation) -> list[tuple[int | None, Conversation]]:
        """What of a conversation is encoded at a time: all of it (None), where each trained reply is written there as
        inference would see it, or else each of those replies (the position of its turn) with what precedes it.

        Raises SampleError where nothing is trained on.
        """
        trained = self.trained_turns(conversation.messages)
        is_last = trained == [len(conversation.messages) - 1]
        if is_last or self._layout.is_together(self._layout.form(conversation), trained):
            return [(None, conversation)]
        return [(turn, conversation.up_to(turn)) for turn in trained]

    def encode(self, conversation: Conversation, roots: Roots) -> Encoded:
        """`roots`: where the images are. Raises SampleError with the reason a sample cannot be used, also where it
        gives several `sequences`."""
        (found,) = self.encode_many([(conversation, roots)])
        if isinstance(found, SampleError):
            raise found
        return found

    def encode_with(self, conversation: Conversation, images: Sequence[FoundImage]) -> Encoded:
        """`encode`, with images that were found already (or others in their place)."""
        return self._assemble_one(self._lay_out(conversation), images)[0]

    def encode_many(
        self, conversations: Iterable[tuple[Conversation, Roots]], known: Known | None = None
    ) -> list[Encoded | SampleError]:
        """`encode` of each (conversation, roots), or the reason it cannot be used.

        All texts go through the tokenizer in one call: that takes half as long as one by one. `known` gets their ids.
        """
        known = {} if known is None else known
        laid_out: list[tuple[LaidOut, list[FoundImage]] | SampleError] = []
        for conversation, roots in conversations:
            try:
                images = self._find_images(conversation, roots)
                laid_out.append((self._lay_out(conversation), images))
            except SampleError as error:
                laid_out.append(error)
        known |= self._encode_texts(one[0] for one in laid_out if not isinstance(one, SampleError))
        return [found if isinstance(found, SampleError) else self._try(*found, known) for found in laid_out]

    def _try(self, laid_out: LaidOut, images: Sequence[FoundImage], known: Known) -> Encoded | SampleError:
        try:
            return self._assemble(laid_out, images, known)[0]
        except SampleError as error:
            return error

    def _assemble_one(self, laid_out: LaidOut, images: Sequence[FoundImage]) -> tuple[Encoded, list[int]]:
        return self._assemble(laid_out, images, self._encode_texts([laid_out]))

    def _encode_texts(self, laid_out: Iterable[LaidOut]) -> Known:
        """The ids of every text that is a conversation's own, in one call of the tokenizer."""
        anchor = self.processor.tokenizer.anchor
        return self.processor.tokenizer.encode_batch(
            {anchor(fragment.context) + text for one in laid_out for fragment, text in one.own_texts}
        )

    def trace(self, conversation: Conversation, encoded: Encoded) -> Traced:
        """Where each id of `encoded` comes from. Raises SampleError where the conversation is not encoded so now."""
        laid_out = self._lay_out(conversation)
        made, starts = self._assemble_one(laid_out, [span.image for span in encoded.images])
        same_flags = np.array_equal(made.supervised, encoded.supervised) and made.weights == encoded.weights
        if not (np.array_equal(made.ids, encoded.ids) and same_flags):
            raise SampleError("what is stored for training is not what the encoder makes of the sample now")
        owners: list[int] = []
        ends = [*starts[1:], made.num_tokens]
        for fragment, start, end in zip(laid_out.fragments, starts, ends, strict=True):
            owners += [-1] * (start - len(owners))
            last = next((i for i in reversed(range(start)) if owners[i] >= 0), None)
            after = None if last is None else int(encoded.ids[last])
            owners += self._owners(fragment, laid_out.pieces, end - start, after)
        return Traced(encoded, tuple(laid_out.pieces), tuple(owners))

    def trained_turns(self, messages: Sequence[Message]) -> list[int]:
        """Which turns are trained on. Raises SampleError where there is none."""
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if self._train_on == "last":
            turns = turns[-1:]
        turns = [turn for turn in turns if messages[turn].train]
        if not turns:
            raise SampleError("there is no assistant turn to train on")
        if turns[0] == 0:
            raise SampleError("the conversation begins with the assistant: there is no prompt to answer")
        return turns

    def _find_images(self, conversation: Conversation, roots: Roots) -> list[FoundImage]:
        images = [find_image(image, roots) for image in conversation.images]
        if images and self.processor.images is None:
            raise SampleError("the sample has images and this model takes none")
        return images

    def _lay_out(self, conversation: Conversation) -> LaidOut:
        trained = self.trained_turns(conversation.messages)
        form = self._layout.form(conversation)
        if self._layout.is_together(form, trained):
            pieces, skeleton = self._layout.lay_out(conversation, form)
        elif trained == [len(conversation.messages) - 1]:
            pieces, skeleton = self._layout.lay_out_alone(conversation, form)
        else:
            several = "the model's chat template rewrites replies that others follow: it has several sequences"
            raise SampleError(self._layout.fault(form) or several)
        weights = [conversation.messages[turn].weight for turn in trained]
        if weights.count(1.0) < len(weights):
            weights = np.array(weights, np.float32).tolist()
        stored = () if weights.count(1.0) == len(weights) else tuple(weights)
        fragments = self._fragmenter.cut(pieces, skeleton, tuple(trained))
        texts = [one.text(pieces) if one.constant is None else one.constant for one in fragments]
        return LaidOut(pieces, fragments, texts, stored)

    def _assemble(self, laid_out: LaidOut, images: Sequence[FoundImage], known: Known) -> tuple[Encoded, list[int]]:
        """The fragments' ids one after the other, and where each begins. `known`: ids of texts that were encoded
        before."""
        ids: list[int] = list(self._prefix(laid_out.pieces))
        supervised = bytearray(len(ids))
        after: int | None = None
        spans: list[ImageSpan] = []
        starts: list[int] = []
        if not images and self.processor.needs_image:
            raise SampleError("the model's processor takes no conversation without an image")
        of_images = self.processor.image_tokens([image.size for image in images])
        for fragment, text in zip(laid_out.fragments, laid_out.texts, strict=True):
            if fragment.kind == "image":
                image, tokens = images[len(spans)], of_images[len(spans)]
                spans.append(ImageSpan(image, len(ids), len(tokens.ids), tokens.num_placeholders))
                new: Sequence[int] = tokens.ids
            else:
                new = self._fragment_ids(fragment, text, after, known)
            starts.append(len(ids))
            ids += new
            supervised += (b"\1" if fragment.supervised else b"\0") * len(new)
            if fragment.ends_turn:
                new = new[:-1]  # an end that the template lacks does not change what follows
            after = new[-1] if new else after
        supervised[0] = False
        if True not in supervised:
            raise SampleError("no token of it is trained on")
        encoded = Encoded(np.array(ids, np.int32), np.frombuffer(supervised, np.bool_), tuple(spans), laid_out.weights)
        if laid_out.weights and len(encoded.run_lengths) != len(laid_out.weights):
            raise SampleError("two turns with weights of their own have nothing between them")
        return encoded, starts

    def _prefix(self, pieces: list[Piece]) -> tuple[int, ...]:
        traits = self.processor.tokenizer.traits
        return () if traits.bos and pieces[0].text.startswith(traits.bos) else traits.prefix_ids

    def _fragment_ids(self, fragment: Fragment, text: str, after: int | None, known: Known) -> Sequence[int]:
        tokenizer = self.processor.tokenizer
        if fragment.constant is not None:
            ids: Sequence[int] = self._constant(text, after)
        else:
            literal = fragment.kind == "literal"
            known = {} if literal else known
            ids = tokenizer.encode(text, after, literal, known, fragment.context)
        if fragment.ends_turn:
            eos = tokenizer.traits.eos_id
            if eos is None:
                raise SampleError(
                    "neither the chat template nor the tokenizer has an end token: set labels.end_of_turn to false"
                )
            ids = [*ids, eos]
        return ids

    def _owners(self, fragment: Fragment, pieces: Sequence[Piece], num_ids: int, after: int | None) -> list[int]:
        """The piece of each of a fragment's ids."""
        if fragment.kind != "text":
            return [fragment.spans[0].piece] * num_ids
        text = fragment.text(pieces)
        ends = list(itertools.accumulate(len(span.text(pieces)) for span in fragment.spans))
        last = self.processor.tokenizer.last_characters(text, after) if text else []
        owners = [fragment.spans[min(bisect_right(ends, position), len(ends) - 1)].piece for position in last]
        return owners + [-1] * (num_ids - len(owners))
