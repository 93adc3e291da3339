"""A set of samples encoded part by part, by several processes where it is large."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.config import Config
from mmtrain.config.schema import Source
from mmtrain.data.encode import Encoded, Encoder
from mmtrain.data.pool import map_in_processes, num_cores
from mmtrain.data.processor import ChatProcessor, load_processor
from mmtrain.data.samples import SampleSet

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

    @classmethod
    def of(cls, config: Config, sources: Sequence[Source]) -> "Recipe":
        return cls(config.model.path, tuple(sources), config.labels.train_on, config.labels.end_of_turn)

    def samples(self, processor: ChatProcessor) -> SampleSet:
        return SampleSet(self.sources, Encoder(processor, self.train_on, self.end_of_turn))


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
    refused: tuple[tuple[int, str], ...]
    """(number of the sample, reason)"""


def encode_part(samples: SampleSet, numbers: Sequence[int]) -> Part:
    found = samples.encode_many(numbers)
    made = [one for one in found if isinstance(one, Encoded)]
    spans = [span for one in made for span in one.images]
    rows = [(s.start, s.length, s.num_placeholders, *s.picture.size) for s in spans]
    return Part(
        np.array([one.num_tokens if isinstance(one, Encoded) else 0 for one in found], np.int32),
        np.array([one.num_supervised if isinstance(one, Encoded) else 0 for one in found], np.int32),
        np.array([len(one.images) if isinstance(one, Encoded) else 0 for one in found], np.int32),
        np.concatenate([np.zeros(0, np.int32), *(one.ids for one in made)]),
        np.concatenate([np.zeros(0, np.bool_), *(one.supervised for one in made)]),
        np.array(rows, np.int32).reshape(-1, 5),
        tuple(str(span.picture.source) for span in spans if isinstance(span.picture.source, Path)),
        tuple((n, str(one)) for n, one in zip(numbers, found, strict=True) if not isinstance(one, Encoded)),
    )


def encode_all(recipe: Recipe, samples: SampleSet) -> Iterator[Part]:
    """Every sample of the set that `recipe` gives, in order."""
    chunks = [range(len(samples))[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    workers = num_cores() if len(samples) >= _MANY else 1
    if workers == 1:
        return (encode_part(samples, chunk) for chunk in chunks)
    return map_in_processes(_encode_in_pool, chunks, workers, _start_worker, (recipe,), __name__)


_of_worker: list[SampleSet] = []  # the one of this process, where it is a pool's


def _start_worker(recipe: Recipe) -> None:
    _of_worker[:] = [recipe.samples(load_processor(recipe.model_path))]


def _encode_in_pool(numbers: range) -> Part:
    return encode_part(_of_worker[0], numbers)
