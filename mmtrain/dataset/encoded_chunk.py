"""Some samples, encoded, as arrays: what one process gives another, and what a store is written from."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Fault:
    """Why training refuses a sample."""

    index: int
    """Of the sample; in a chunk its position there."""
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """What is right and yet worth knowing: how often it was found, and the first sample with its reason. In a chunk
    `first` is the sample's position there."""

    count: int
    first: int
    reason: str


@dataclass(frozen=True, eq=False)
class SampleArrays:
    """Some samples, encoded: their ids one after the other, and a row for each image.

    The arrays of several chunks one after the other are those of all their samples.
    """

    records: npt.NDArray[np.int32]
    """(num_samples,) the number of each sample's record"""
    turns: npt.NDArray[np.int32]
    """(num_samples,) the turn that alone is trained on, -1 where the sample is all of its record"""
    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where a sample is refused."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_images: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_weights: npt.NDArray[np.int32]
    """(num_samples,) the trained turns of a sample in which not every weight is 1, 0 of others."""
    sum_weights: npt.NDArray[np.float64]
    """(num_samples,) the sum of the weights of its supervised tokens."""
    ids: npt.NDArray[np.int32]
    """(num_tokens,)"""
    supervised: npt.NDArray[np.bool_]
    """(num_tokens,)"""
    spans: npt.NDArray[np.int32]
    """(num_images, 5) start, length, placeholders, width, height"""
    weights: npt.NDArray[np.float32]
    """(num_weights,) of the samples one after the other"""


CHUNK_ARRAYS = tuple(field.name for field in fields(SampleArrays))


@dataclass(frozen=True, eq=False)
class EncodedChunk(SampleArrays):
    """Some samples as one process gives them to another."""

    image_files: tuple[str, ...]
    """The paths of the images that are files, resolved."""
    sought_files: tuple[str, ...]
    """Where the images of refused samples were looked for: a file that appears there may change the refusal."""
    faults: tuple[Fault, ...]
    notes: dict[str, Note]
    """By kind."""


def sorted_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Each path once, in order."""
    return tuple(sorted(set(paths)))


def join_chunks(chunks: Sequence[EncodedChunk]) -> EncodedChunk:
    """The samples of `chunks` as those of one."""
    if len(chunks) == 1:
        return chunks[0]
    firsts = list(itertools.accumulate((len(chunk.records) for chunk in chunks), initial=0))[:-1]
    together: dict[str, Any] = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in CHUNK_ARRAYS
    }
    return EncodedChunk(
        **together,
        image_files=sorted_paths(path for chunk in chunks for path in chunk.image_files),
        sought_files=sorted_paths(path for chunk in chunks for path in chunk.sought_files),
        faults=tuple(merge_faults([(first, chunk.faults) for first, chunk in zip(firsts, chunks, strict=True)])),
        notes=merge_notes([(first, chunk.notes) for first, chunk in zip(firsts, chunks, strict=True)]),
    )


def merge_faults(each: Iterable[tuple[int, Sequence[Fault]]]) -> list[Fault]:
    """The faults of several chunks as those of one, each given with the position of its first sample."""
    return [replace(fault, index=first + fault.index) for first, faults in each for fault in faults]


def merge_notes(each: Iterable[tuple[int, Mapping[str, Note]]]) -> dict[str, Note]:
    """The notes of several chunks, in their order, as those of one, each given with the position of its first
    sample."""
    merged: dict[str, Note] = {}
    for start, notes in each:
        for kind, note in notes.items():
            first = merged.get(kind, Note(0, start + note.first, note.reason))
            merged[kind] = Note(first.count + note.count, first.first, first.reason)
    return merged
