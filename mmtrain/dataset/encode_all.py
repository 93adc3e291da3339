"""All samples of a record set encoded and checked, chunk by chunk, by several processes where there are many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.checks.findings import IGNORED, REFUSED, UNCHECKED, UNDECODABLE, Finding
from mmtrain.checks.labels import Checker
from mmtrain.config import Config
from mmtrain.config.schema import Source
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.workers import map_in_processes, num_cores
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.record_set import RecordSet

_CHUNK = 256
_MANY = 16_000
"""Samples from which on other processes are worth the seconds that they take to start."""


@dataclass(frozen=True, slots=True)
class EncodingSpec:
    """What is encoded and how: all that another process needs to do the same."""

    model_path: str
    sources: tuple[Source, ...]
    train_on: str
    end_of_turn: bool
    decode_images: bool = True
    ignored: tuple[str, ...] = ()
    """Keys of records, and marks in their text, that need not be understood."""
    chat_template: str | None = None
    """The file with the chat template in place of the model's own."""

    @classmethod
    def of(cls, config: Config, sources: Sequence[Source]) -> "EncodingSpec":
        labels, data = config.labels, config.data
        return cls(
            config.model.path,
            tuple(sources),
            labels.train_on,
            labels.end_of_turn,
            data.decode_images,
            tuple(sorted(data.ignore_fields)),
            config.model.chat_template,
        )

    def records(self) -> RecordSet:
        """The records, their files opened. Raises UserError where one cannot be read."""
        return RecordSet(self.sources, frozenset(self.ignored))

    def encoder(self, processor: ChatProcessor) -> Encoder:
        return Encoder(processor, self.train_on, self.end_of_turn)

    def checker(self, processor: ChatProcessor) -> Checker:
        return Checker(processor, self.train_on, self.end_of_turn, self.ignored)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why training refuses a sample."""

    index: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """What is right and yet worth knowing: how often it was found, and the first sample with its reason."""

    count: int
    first: int
    reason: str


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Some samples, encoded: their ids one after the other, and a row for each image."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where a sample is refused."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_images: npt.NDArray[np.int32]
    """(num_samples,)"""
    ids: npt.NDArray[np.int32]
    """(num_tokens,)"""
    supervised: npt.NDArray[np.bool_]
    """(num_tokens,)"""
    spans: npt.NDArray[np.int32]
    """(num_images, 5) start, length, placeholders, width, height"""
    image_files: tuple[str, ...]
    """The paths of the images that are files, resolved."""
    faults: tuple[Fault, ...]
    notes: dict[str, Note]
    """By kind."""


class ChunkEncoder:
    """Encodes samples and checks the result, by checks that do not know the encoder."""

    def __init__(
        self, spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, num_threads: int | None = None
    ) -> None:
        """`num_threads`: for decoding images; None: as many as there are cores."""
        self._records = records
        self._encoder, self._checker = spec.encoder(processor), spec.checker(processor)
        self._decode, self._num_threads = spec.decode_images, num_threads or num_cores()

    def encode(self, indices: Sequence[int]) -> EncodedChunk:
        found = self._encode_each(indices)
        encoded = [one for _, one in found if isinstance(one, Encoded)]
        failing = self._failing_images(encoded)
        findings = [
            (index, finding)
            for index, (conversation, one) in zip(indices, found, strict=True)
            for finding in self._findings(conversation, one, failing)
        ]
        spans = [span for one in encoded for span in one.images]
        rows = [(s.start, s.length, s.num_placeholders, *s.image.size) for s in spans]
        sizes = [
            (one.num_tokens, one.num_supervised, len(one.images)) if isinstance(one, Encoded) else (0, 0, 0)
            for _, one in found
        ]
        num_tokens, num_supervised, num_images = np.array(sizes, np.int32).reshape(-1, 3).T
        return EncodedChunk(
            num_tokens,
            num_supervised,
            num_images,
            np.concatenate([np.zeros(0, np.int32), *(one.ids for one in encoded)]),
            np.concatenate([np.zeros(0, np.bool_), *(one.supervised for one in encoded)]),
            np.array(rows, np.int32).reshape(-1, 5),
            tuple(str(span.image.source) for span in spans if isinstance(span.image.source, Path)),
            tuple(Fault(index, one.kind, one.reason) for index, one in findings if one.is_fault),
            merge_notes([{one.kind: Note(1, index, one.reason)} for index, one in findings if not one.is_fault]),
        )

    def _encode_each(self, indices: Sequence[int]) -> list[tuple[Conversation | None, Encoded | SampleError]]:
        """Each sample's conversation, None where the record is none, and its encoding or why it cannot be used."""
        read: list[tuple[Conversation, Path] | SampleError] = []
        for index in indices:
            try:
                read.append((self._records.conversation(index), self._records.root(index)))
            except SampleError as error:
                read.append(error)
        encoded = iter(self._encoder.encode_many(one for one in read if not isinstance(one, SampleError)))
        return [(None, one) if isinstance(one, SampleError) else (one[0], next(encoded)) for one in read]

    def _failing_images(self, encoded: Sequence[Encoded]) -> dict[Path | bytes, str]:
        if not self._decode:
            return {}
        return images_that_fail((span.image for one in encoded for span in one.images), self._num_threads)

    def _findings(
        self, conversation: Conversation | None, one: Encoded | SampleError, failing: dict[Path | bytes, str]
    ) -> Iterator[Finding]:
        """What is wrong with a sample, or worth knowing."""
        if isinstance(one, SampleError) or conversation is None:
            yield Finding(REFUSED, True, str(one))
            return
        labels = np.where(one.supervised, one.ids, IGNORED).tolist()
        sizes = [span.image.size for span in one.images]
        try:
            yield from self._checker.check(one.ids.tolist(), labels, conversation, sizes)
        except SampleError as error:
            yield Finding(UNCHECKED, True, str(error))
        for span in one.images:
            if span.image.source in failing:
                yield Finding(UNDECODABLE, True, failing[span.image.source])


def merge_notes(each: Sequence[dict[str, Note]]) -> dict[str, Note]:
    """The notes of chunks, in their order, as one."""
    merged: dict[str, Note] = {}
    for notes in each:
        for kind, note in notes.items():
            first = merged.get(kind, Note(0, note.first, note.reason))
            merged[kind] = Note(first.count + note.count, first.first, first.reason)
    return merged


def encode_all(spec: EncodingSpec, records: RecordSet, processor: ChatProcessor) -> Iterator[EncodedChunk]:
    """Every record encoded as `spec` says, in order."""
    chunks = [range(len(records))[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    workers = num_cores() if len(records) >= _MANY else 1
    if workers == 1:
        encoder = ChunkEncoder(spec, records, processor)
        return (encoder.encode(chunk) for chunk in chunks)
    return map_in_processes(_encode_in_worker, chunks, workers, _start_worker, (spec,), __name__)


_of_worker: list[ChunkEncoder] = []  # the one of this process, where it is a worker


def _start_worker(spec: EncodingSpec) -> None:
    processor = load_processor(spec.model_path, spec.chat_template, tried=True)
    _of_worker[:] = [ChunkEncoder(spec, spec.records(), processor, num_threads=1)]


def _encode_in_worker(indices: range) -> EncodedChunk:
    return _of_worker[0].encode(indices)
