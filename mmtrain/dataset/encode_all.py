"""A set of samples encoded and checked part by part, by several processes where it is large."""

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
from mmtrain.dataset.samples import SampleSet
from mmtrain.dataset.workers import map_in_processes, num_cores
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, SampleError

_CHUNK = 256
_MANY = 16_000
"""Samples from which on other processes are worth the seconds that they take to start."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What samples are encoded from and how: all that another process needs to do the same."""

    model_path: str
    sources: tuple[Source, ...]
    train_on: str
    end_of_turn: bool
    decode_images: bool = True
    ignored: tuple[str, ...] = ()
    """Keys of records, and marks in their text, that need not be understood."""

    @classmethod
    def of(cls, config: Config, sources: Sequence[Source]) -> "Recipe":
        labels, data = config.labels, config.data
        return cls(
            config.model.path,
            tuple(sources),
            labels.train_on,
            labels.end_of_turn,
            data.decode_images,
            tuple(sorted(data.ignore_fields)),
        )

    def samples(self, processor: ChatProcessor) -> SampleSet:
        return SampleSet(self.sources, Encoder(processor, self.train_on, self.end_of_turn), frozenset(self.ignored))

    def checker(self, processor: ChatProcessor) -> Checker:
        return Checker(processor, self.train_on, self.end_of_turn, self.ignored)


@dataclass(frozen=True, slots=True)
class Note:
    """What is right and yet worth knowing: how often it was found, and the first sample with its reason."""

    count: int
    first: int
    reason: str


@dataclass(slots=True)
class Part:
    """Some samples, encoded: their ids one behind the other, and a row for each picture."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where a sample is refused."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_pictures: npt.NDArray[np.int32]
    """(num_samples,)"""
    ids: npt.NDArray[np.int32]
    """(num_tokens,)"""
    supervised: npt.NDArray[np.bool_]
    """(num_tokens,)"""
    spans: npt.NDArray[np.int32]
    """(num_pictures, 5) start, length, placeholders, width, height"""
    files: tuple[str, ...]
    """Of the pictures that are files."""
    faults: tuple[tuple[int, str, str], ...]
    """(number of the sample, kind, reason): training refuses these samples."""
    notes: dict[str, Note]
    """By kind."""


class PartEncoder:
    """Encodes samples of one set and checks what came out, by checks that do not know the encoder."""

    def __init__(self, recipe: Recipe, processor: ChatProcessor, num_threads: int | None = None) -> None:
        """`num_threads`: for decoding images; None: as many as there are cores."""
        self.samples = recipe.samples(processor)
        self._checker = recipe.checker(processor)
        self._decode, self._num_threads = recipe.decode_images, num_threads or num_cores()

    def encode(self, numbers: Sequence[int]) -> Part:
        found = self.samples.encode_many(numbers)
        made = [one for _, one in found if isinstance(one, Encoded)]
        failing = self._failing(made)
        findings = [
            (number, finding)
            for number, (conversation, one) in zip(numbers, found, strict=True)
            for finding in self._findings(conversation, one, failing)
        ]
        spans = [span for one in made for span in one.images]
        rows = [(s.start, s.length, s.num_placeholders, *s.picture.size) for s in spans]
        sizes = [
            (one.num_tokens, one.num_supervised, len(one.images)) if isinstance(one, Encoded) else (0, 0, 0)
            for _, one in found
        ]
        num_tokens, num_supervised, num_pictures = np.array(sizes, np.int32).reshape(-1, 3).T
        return Part(
            num_tokens,
            num_supervised,
            num_pictures,
            np.concatenate([np.zeros(0, np.int32), *(one.ids for one in made)]),
            np.concatenate([np.zeros(0, np.bool_), *(one.supervised for one in made)]),
            np.array(rows, np.int32).reshape(-1, 5),
            tuple(str(span.picture.source) for span in spans if isinstance(span.picture.source, Path)),
            tuple((number, one.kind, one.reason) for number, one in findings if one.is_fault),
            merge_notes([{one.kind: Note(1, number, one.reason)} for number, one in findings if not one.is_fault]),
        )

    def _failing(self, made: Sequence[Encoded]) -> dict[Path | bytes, str]:
        if not self._decode:
            return {}
        return images_that_fail((span.picture for one in made for span in one.images), self._num_threads)

    def _findings(
        self, conversation: Conversation | None, one: Encoded | SampleError, failing: dict[Path | bytes, str]
    ) -> Iterator[Finding]:
        """What is wrong with a sample, or worth knowing."""
        if isinstance(one, SampleError) or conversation is None:
            yield Finding(REFUSED, True, str(one))
            return
        labels = np.where(one.supervised, one.ids, IGNORED).tolist()
        sizes = [span.picture.size for span in one.images]
        try:
            yield from self._checker.check(one.ids.tolist(), labels, conversation, sizes)
        except SampleError as error:
            yield Finding(UNCHECKED, True, str(error))
        for span in one.images:
            if span.picture.source in failing:
                yield Finding(UNDECODABLE, True, failing[span.picture.source])


def merge_notes(each: Sequence[dict[str, Note]]) -> dict[str, Note]:
    """The notes of parts, in their order, as one."""
    merged: dict[str, Note] = {}
    for notes in each:
        for kind, note in notes.items():
            first = merged.get(kind, Note(0, note.first, note.reason))
            merged[kind] = Note(first.count + note.count, first.first, first.reason)
    return merged


def encode_all(recipe: Recipe, samples: SampleSet) -> Iterator[Part]:
    """Every sample of the set that `recipe` gives, in order."""
    chunks = [range(len(samples))[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    workers = num_cores() if len(samples) >= _MANY else 1
    if workers == 1:
        encoder = PartEncoder(recipe, samples.encoder.processor)
        return (encoder.encode(chunk) for chunk in chunks)
    return map_in_processes(_encode_in_pool, chunks, workers, _start_worker, (recipe,), __name__)


_of_worker: list[PartEncoder] = []  # the one of this process, where it is a pool's


def _start_worker(recipe: Recipe) -> None:
    _of_worker[:] = [PartEncoder(recipe, load_processor(recipe.model_path, tried=True), 1)]


def _encode_in_pool(numbers: range) -> Part:
    return _of_worker[0].encode(numbers)
