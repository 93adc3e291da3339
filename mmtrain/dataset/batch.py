"""Encoded samples and their pixels as the tensors of one micro-batch."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmtrain.dataset.ahead import in_order
from mmtrain.dataset.image_inputs import FeatureCache, ImageInputs, all_pinned, check_laid_out, load_image_inputs
from mmtrain.dataset.image_loader import ImageLoader
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError, refused_at
from mmtrain.records.sources.place import Place


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one sample: input_ids[row, start : start + length], and of its images among the batch's."""

    sample: int
    row: int
    start: int
    length: int
    first_image: int
    num_images: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, on the CPU. Packed: one row, the samples one after the other, then padding; otherwise a row for
    each sample, padded on the right."""

    input_ids: Tensor
    """(rows, length) int64"""
    supervised: Tensor
    """(rows, length) bool; never true for the first token of a sample, so no sample is predicted from another."""
    segments: tuple[Segment, ...]
    packed: bool
    image_inputs: dict[str, Tensor]
    """The model's inputs for the images, as its processor made them; without pixels where features are cached."""
    images: tuple[ImageInputs, ...] = ()
    """Each image on its own where features are cached; otherwise none."""
    weights: Tensor | None = None
    """(num_supervised,) float32: what each supervised token counts in the loss; None where every one counts 1."""

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def has_images(self) -> bool:
        return bool(self.image_inputs or self.images)

    def padding_mask(self) -> Tensor:
        """(rows, length) int64: 1 at the tokens of samples, 0 at padding."""
        mask = torch.zeros_like(self.input_ids)
        for segment in self.segments:
            mask[segment.row, segment.start : segment.start + segment.length] = 1
        return mask

    def weighted(self, nll: Tensor) -> Tensor:
        """`nll`, (num_supervised,), each value times the weight of its token."""
        return nll if self.weights is None else nll * self.weights.to(nll.device)

    @property
    def num_bytes(self) -> int:
        """Of its tensors, without features that are cached."""
        images = (self.image_inputs, *(image.inputs for image in self.images if image.features is None))
        values = [value for inputs in images for value in inputs.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in (self.input_ids, self.supervised, *values))

    def pinned(self) -> "Batch":
        """The same in page-locked memory."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            supervised=self.supervised.pin_memory(),
            image_inputs=all_pinned(self.image_inputs),
            images=tuple(image.pinned() for image in self.images),
        )


def make_batch(
    numbers: Sequence[int],
    encoded: Sequence[Encoded],
    processor: ChatProcessor,
    packing: bool,
    image_cache: FeatureCache | None = None,
    row_multiple: int = 1,
    load_images: ImageLoader | None = None,
) -> Batch:
    """One batch of the samples, with their images decoded, except those whose features are in `image_cache`. A packed
    row is padded to a multiple of `row_multiple` tokens. `load_images`: None for this thread.

    `numbers`: the samples' indices. Raises SampleError where an image does not decode, or the processor makes other ids
    for it than when it was encoded.
    """
    segments = tuple(_segments(numbers, encoded, packing))
    length = max(segment.start + segment.length for segment in segments)
    shape = (1, length + -length % row_multiple) if packing else (len(encoded), length)
    input_ids = np.full(shape, processor.tokenizer.traits.pad_id, np.int64)
    supervised = np.zeros(shape, np.bool_)
    for segment, sample in zip(segments, encoded, strict=True):
        span = (segment.row, slice(segment.start, segment.start + segment.length))
        input_ids[span] = sample.ids
        supervised[span] = sample.supervised
    tensors = torch.from_numpy(input_ids), torch.from_numpy(supervised)
    weights = _weights(encoded)
    load_images = load_images or ImageLoader(processor)
    if image_cache is None:
        inputs = _image_inputs(encoded, processor, load_images)
        return Batch(*tensors, segments, packing, inputs, weights=weights)
    spans = [(span, sample.ids[span.start : span.start + span.length]) for sample in encoded for span in sample.images]
    images = tuple(load_image_inputs(span, ids.tolist(), load_images, image_cache) for span, ids in spans)
    return Batch(*tensors, segments, packing, _other_inputs(images), images, weights)


def _segments(numbers: Sequence[int], encoded: Sequence[Encoded], packing: bool) -> Iterator[Segment]:
    at = first_image = 0
    for row, (number, sample) in enumerate(zip(numbers, encoded, strict=True)):
        place = (0, at) if packing else (row, 0)
        yield Segment(number, *place, sample.num_tokens, first_image, len(sample.images))
        at += sample.num_tokens
        first_image += len(sample.images)


def _weights(encoded: Sequence[Encoded]) -> Tensor | None:
    if not any(sample.weights for sample in encoded):
        return None
    return torch.from_numpy(np.concatenate([sample.token_weights for sample in encoded]))


def _other_inputs(images: Sequence[ImageInputs]) -> dict[str, Tensor]:
    """The inputs other than pixels, of all images in order."""
    each = [image.other_inputs for image in images]
    return {name: torch.cat([one[name] for one in each]) for name in (each[0] if each else ())}


def _image_inputs(encoded: Sequence[Encoded], processor: ChatProcessor, load_images: ImageLoader) -> dict[str, Tensor]:
    spans = [(sample, span) for sample in encoded for span in sample.images]
    if not spans:
        return {}
    if len(encoded) > 1 and not processor.lays_out_together:
        raise SampleError("the model's images are laid out for one sample at a time, and here are several")
    samples = [[span.image for span in sample.images] for sample in encoded if sample.images]
    alone = None if processor.lays_out_together else encoded[0].ids.tolist()
    inputs, laid_out = load_images(samples, alone)
    measured = [int(id_) for sample, span in spans for id_ in sample.ids[span.start : span.start + span.length]]
    check_laid_out([span for _, span in spans], measured, laid_out)
    return inputs


class Samples(Protocol):
    """Samples by index."""

    def encoded(self, index: int) -> Encoded: ...

    def place(self, index: int) -> Place: ...


class Loader:
    """Makes batches ahead of their use, in threads; `load_images` decodes images there or in other processes."""

    def __init__(
        self,
        samples: Samples,
        processor: ChatProcessor,
        packing: bool,
        image_cache: FeatureCache | None = None,
        row_multiple: int = 1,
        load_images: ImageLoader | None = None,
    ) -> None:
        self._samples, self._load_images = samples, load_images or ImageLoader(processor)
        self._make_batch = functools.partial(
            make_batch,
            processor=processor,
            packing=packing,
            image_cache=image_cache,
            row_multiple=row_multiple,
            load_images=self._load_images,
        )

    def batches(self, cuts: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """A batch for each list of sample indices, in order. Raises UserError naming the sample that fails."""
        return in_order(self.load, cuts, lambda batch: batch.num_bytes, self._load_images)

    def load(self, numbers: Sequence[int]) -> Batch:
        """The batch of these samples. Raises UserError naming the sample that cannot be read or decoded, or all of them
        where only the batch as a whole cannot be made."""
        encoded: list[Encoded] = []
        for number in numbers:
            with refused_at(self._samples.place(number)):
                encoded.append(self._samples.encoded(number))
        try:
            return self._make(numbers, encoded)
        except UserError as error:
            raise UserError(f"{self._places(numbers)}: {error}") from None
        except SampleError as error:
            for number, sample in zip(numbers, encoded, strict=True):
                with refused_at(self._samples.place(number)):
                    self._make([number], [sample])
            # each alone is fine: an image has just changed, or the processor makes other ids for several at once
            raise UserError(f"{self._places(numbers)}: the samples cannot be laid out together: {error}") from None

    def _places(self, numbers: Sequence[int]) -> str:
        return ", ".join(str(self._samples.place(number)) for number in numbers)

    def _make(self, numbers: Sequence[int], encoded: Sequence[Encoded]) -> Batch:
        batch = self._make_batch(numbers, encoded)
        return batch.pinned() if self._load_images.on_gpu else batch
