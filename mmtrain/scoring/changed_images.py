"""The same answers with other images: a model that looks at them scores worse, one that ignores them does not."""

import io
from dataclasses import replace
from typing import Literal

import numpy as np
import PIL.Image

from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.images import FoundImage, find_image
from mmtrain.records.chat import Conversation, Image, SampleError
from mmtrain.records.sources.place import Place

Change = Literal["swapped", "grey", "none"]
CHANGES: tuple[Change, ...] = ("swapped", "grey", "none")
_GREY = (128, 128, 128)


class ChangedImages:
    """Samples whose images are those of another sample, or plain grey of the same size, or left out.

    Placeholders are laid out anew for the new images; text and labels stay.
    """

    def __init__(self, samples: StoredSamples, encoder: Encoder, change: Change, indices: Indices) -> None:
        self._samples, self._encoder = samples, encoder
        self._change = change
        self._donors = _donors(samples, indices) if change == "swapped" else {}

    @property
    def indices(self) -> Indices | None:
        """The samples that have other images to be swapped with; None where the change is possible for all."""
        return np.array(sorted(self._donors), np.int64) if self._change == "swapped" else None

    def place(self, index: int) -> Place:
        return self._samples.place(index)

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError where the changed sample cannot be encoded."""
        conversation = self._samples.records.conversation(index)
        if self._change == "none":
            return self._encoder.encode_with(_without_images(conversation), ())
        images = self._images_of(index)
        if self._change == "grey":
            return self._encoder.encode_with(conversation, [_grey(image) for image in images])
        pool = [image for donor in self._donors[index] for image in self._images_of(donor)]
        return self._encoder.encode_with(conversation, [pool[i % len(pool)] for i in range(len(images))])

    def _images_of(self, index: int) -> list[FoundImage]:
        """The images of a sample, found and measured."""
        records = self._samples.records
        return [find_image(image, records.roots(index)) for image in records.conversation(index).images]


def _donors(samples: StoredSamples, indices: Indices) -> dict[int, list[int]]:
    """For each sample the samples whose images it gets: the next ones, on a random circle of its source, that have
    none of its own images. A sample without such a donor is left out."""
    names = {int(index): _names(samples.records.conversation(int(index))) for index in indices}
    by_source: dict[int, list[int]] = {}
    for index, own in names.items():
        if own:
            by_source.setdefault(samples.records.source(index), []).append(index)
    donors: dict[int, list[int]] = {}
    for source, circle in by_source.items():
        order = np.random.default_rng([0, source]).permutation(circle).tolist()
        for position, index in enumerate(order):
            following = (order[(position + step) % len(order)] for step in range(1, len(order)))
            others = (other for other in following if not set(names[other]) & set(names[index]))
            chosen: list[int] = []
            while sum(len(names[other]) for other in chosen) < len(names[index]):
                other = next(others, None)
                if other is None:
                    break
                chosen.append(other)
            if chosen:
                donors[index] = chosen
    return donors


def _names(conversation: Conversation) -> list[object]:
    return [image.data or image.name for image in conversation.images]


def _without_images(conversation: Conversation) -> Conversation:
    messages = (
        replace(message, parts=tuple(part for part in message.parts if not isinstance(part, Image)))
        for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


def _grey(image: FoundImage) -> FoundImage:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", image.size, _GREY).save(buffer, "PNG")
    return FoundImage(image.name, buffer.getvalue(), image.size)


def encodable(samples: ChangedImages, indices: Indices, max_length: int) -> tuple[Indices, list[int]]:
    """The samples that can still be encoded within `max_length` tokens after the change, and their lengths."""
    found, lengths = [], []
    for index in indices.tolist():
        try:
            length = samples.encoded(index).num_tokens
        except SampleError:
            continue
        if length <= max_length:
            found.append(index)
            lengths.append(length)
    return np.array(found, np.int64), lengths
