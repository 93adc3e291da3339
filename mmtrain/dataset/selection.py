"""Which of the samples that can be used are used: without duplicates, one side of a split, at most so many."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from mmtrain.config.data_section import Data, EvalSource, Source
from mmtrain.dataset.hashes import image_hashes
from mmtrain.dataset.plan import Indices, permutation
from mmtrain.dataset.samples import StoredSamples
from mmtrain.records.record_set import RecordSet

Keys = dict[int, tuple[bytes, ...]]
"""By sample: a SHA-256 of each of its images, or where it has none one of its tokens."""


class Side(Enum):
    """Which samples of a source that is split are meant."""

    ALL = "all"
    TRAINING = "training"
    HELD_OUT = "held out"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which samples of one source are used."""

    max_samples: int | None = None
    side: Side = Side.ALL
    share: float = 0.0
    """Of the samples, held out for evaluation."""
    dedup: bool = False


@dataclass(frozen=True, slots=True)
class SelectedSources:
    """Sources of records with what is used of each, and the name of each in reports."""

    sources: tuple[Source, ...]
    choices: tuple[Choice, ...]
    names: tuple[str, ...]

    @classmethod
    def for_training(cls, data: Data) -> "SelectedSources":
        share = sum(source.share or 0.0 for source in data.eval)
        side = Side.TRAINING if share else Side.ALL
        choices = tuple(Choice(source.max_samples, side, share, data.dedup) for source in data.train)
        return cls(data.train, choices, tuple(Path(source.path).name for source in data.train))

    @classmethod
    def for_evaluation(cls, data: Data, sources: Sequence[EvalSource]) -> "SelectedSources":
        """Of `sources`; one that is held out of the training data stands for all sources of that."""
        found: list[tuple[Source, Choice, str]] = []
        for source in sources:
            if source.from_ is None:
                found.append((source, Choice(source.max_samples), source.title))
            else:
                choice = Choice(source.max_samples, Side.HELD_OUT, source.share or 0.0, data.dedup)
                found += [(own, choice, source.title) for own in data.train]
        return cls(*(tuple(column) for column in zip(*found, strict=True))) if found else cls((), (), ())

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return all(choice == Choice() for choice in self.choices)


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selection leaves out."""

    duplicates: tuple[tuple[int, str], ...]
    """Sample index and reason of each sample that is the same as an earlier one."""
    other_side: Indices
    """The samples on the other side of the split."""
    over_max: Indices
    """The samples over `max_samples`."""

    @property
    def indices(self) -> Indices:
        """Of all samples that are left out."""
        return np.concatenate([np.array([i for i, _ in self.duplicates], np.int64), self.other_side, self.over_max])


def select(samples: StoredSamples, used: Indices, choices: Sequence[Choice]) -> Selected:
    """What `choices`, one for each source, leave out of the samples `used`, in this order: duplicates, the other side
    of the split, and what is over the maximum."""
    source_of = samples.records.sources_of(used)
    choice_of = [choices[number] for number in source_of.tolist()]
    duplicates = find_duplicates(samples, used[[choice.dedup for choice in choice_of]].tolist())
    left = ~np.isin(used, [index for index, _ in duplicates])
    other = other_side(samples.records, used[left], choices, lambda indices: image_keys(samples, indices))
    left &= ~np.isin(used, other)
    over = [_over_max(used[left & (source_of == number)], choice) for number, choice in enumerate(choices)]
    return Selected(tuple(duplicates), other, np.concatenate([np.zeros(0, np.int64), *over]))


def _over_max(indices: Indices, choice: Choice) -> Indices:
    """A random choice of the samples over the maximum: the same in every run, and nearly the same with more data."""
    if choice.max_samples is None or len(indices) <= choice.max_samples:
        return indices[:0]
    return indices[np.sort(permutation(len(indices), 0, 0, 0)[choice.max_samples :])]


# --- duplicates


def find_duplicates(samples: StoredSamples, indices: Iterable[int]) -> list[tuple[int, str]]:
    """The samples that are the same as an earlier one: index and reason."""
    groups = equal_samples(samples, indices)
    return sorted(
        (index, f"the same as {samples.place(first)} (data.dedup)") for first, *others in groups for index in others
    )


def equal_samples(samples: StoredSamples, indices: Iterable[int]) -> list[list[int]]:
    """Each group of samples, in order, that have the same tokens, the same labels and the same bytes of images."""
    same: dict[bytes, list[int]] = {}
    for index in indices:
        same.setdefault(_tokens_key(samples, index), []).append(index)
    candidates = [group for group in same.values() if len(group) > 1]
    keys = image_keys(samples, (index for group in candidates for index in group))
    groups: dict[tuple[int | bytes, ...], list[int]] = {}
    for number, group in enumerate(candidates):
        for index in group:
            groups.setdefault((number, *keys[index]), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _tokens_key(samples: StoredSamples, index: int) -> bytes:
    """A hash of what the model is given and trained on, except for the pixels."""
    made = hashlib.sha256()
    weights = samples.store.weights_of(index)
    more = (np.array(weights, np.float32),) if weights else ()
    for array in (*samples.store.tokens(index), samples.store.spans_of(index), *more):
        made.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
    return made.digest()


def image_keys(samples: StoredSamples, indices: Iterable[int]) -> Keys:
    """By sample, a SHA-256 of each of its images; of its tokens where it has no image."""
    found: dict[int, list[Path | bytes]] = {}
    for index in indices:
        has_images = int(samples.store.num_images[index]) > 0
        found[index] = [span.image.source for span in samples.encoded(index).images] if has_images else []
    hash_of = image_hashes(source for sources in found.values() for source in sources)
    return {
        index: tuple(bytes.fromhex(hash_of[source]) for source in sources) or (_tokens_key(samples, index),)
        for index, sources in found.items()
    }


def sample_keys(samples: StoredSamples, indices: Sequence[int]) -> Keys:
    """By sample, what two samples that are the same have in common: tokens, labels and the bytes of their images."""
    return {index: (_tokens_key(samples, index), *keys) for index, keys in image_keys(samples, indices).items()}


# --- the split


def other_side(
    records: RecordSet, used: Indices, choices: Sequence[Choice], keys_of: Callable[[Sequence[int]], Keys]
) -> Indices:
    """Of the samples `used`, those on the other side of the split than their source's choice. `keys_of` gives what
    samples on one side have in common."""
    sides = [choices[number].side for number in records.sources_of(used).tolist()]
    split = [(index, side) for index, side in zip(used.tolist(), sides, strict=True) if side is not Side.ALL]
    share = max((choice.share for choice in choices), default=0.0)
    held_out = _held_out(records, keys_of([index for index, _ in split]), share) if split else set()
    return np.array([index for index, side in split if (index in held_out) != (side is Side.HELD_OUT)], np.int64)


def _held_out(records: RecordSet, keys: Keys, share: float) -> set[int]:
    """The samples that are held out of training: about a `share` of them.

    Samples that have a key, which is mostly an image, or their record in common, directly or through others, stay on
    one side. The side follows from the smallest hash among them, so it stays the same when data is added or put in
    another order, except where new samples connect two groups. Each side has at least one group where there are two.
    """
    of_record: dict[int, tuple[bytes, ...]] = {}
    for index, own in keys.items():
        record = records.record(index)
        of_record[record] = (*of_record.get(record, ()), *own)
    smallest = _smallest_of_groups(of_record.values())
    fractions = sorted({_fraction(group) for group in smallest.values()})
    num_below = sum(fraction < share for fraction in fractions)
    num_held_out = min(max(num_below, 1), max(len(fractions) - 1, 0))
    chosen = set(fractions[:num_held_out])
    return {index for index, own in keys.items() if _fraction(smallest[own[0]]) in chosen}


def _smallest_of_groups(connected: Iterable[tuple[bytes, ...]]) -> dict[bytes, bytes]:
    """For each key the smallest one of its group; the keys of one tuple are connected (union-find)."""
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for keys in connected:
        roots = {root(key) for key in keys}
        smallest = min(roots)
        for one in roots:
            parent[one] = smallest
    return {key: root(key) for key in list(parent)}


def _fraction(key: bytes) -> float:
    """A number from 0 to 1 that follows from a key and is evenly distributed, also over keys that are the smallest of
    many."""
    return int.from_bytes(hashlib.sha256(b"split" + key).digest()[:8], "big") / 2**64
