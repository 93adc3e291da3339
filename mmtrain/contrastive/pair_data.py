"""The pairs of a data set, every record read and checked, with each distinct item numbered once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmtrain.contrastive.relation import PairItems
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.pair_items import FoundItem, content_keys, find_item
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.validate import FaultPolicy, LengthLimit, Reason, left_out
from mmtrain.encoding.images import locate
from mmtrain.errors import UserError
from mmtrain.progress import QUIET, Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Pair
from mmtrain.records.record_set import RecordSet

_AT_ONCE = 512
"""Records whose images are in memory at once, where they are not files of their own."""
_THREADS = 4


@dataclass(frozen=True, slots=True)
class ItemLimit:
    """How long an item may be, and how its tokens are counted."""

    limit: LengthLimit
    num_tokens: Callable[[FoundItem], int]
    """Of the whole item, before anything is cut. Raises SampleError where the model cannot take such an item."""


@dataclass(slots=True)
class PairData:
    """Pairs by the index of their sample. The content of items stays in the files: it is read when it is needed."""

    records: RecordSet
    pairs: dict[int, PairItems] = field(default_factory=dict)
    """Of each sample that was read: those with a fault are not in it."""
    faults: list[Reason] = field(default_factory=list)
    long: list[Reason] = field(default_factory=list)
    """The samples with an item that is too long."""
    keys: list[str] = field(default_factory=list)
    """The content key of each item."""
    num_tokens: list[int] = field(default_factory=list)
    """Of each item, 0 where they were not counted."""
    first: list[tuple[int, int]] = field(default_factory=list)
    """Of each item, the sample that first has it, and its position in `Pair.items` of that sample."""
    sizes: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    """Of each item, the size of its images."""

    @property
    def num_items(self) -> int:
        return len(self.keys)

    def sample_of(self, number: int) -> int:
        """The index of the first sample with an item."""
        return self.first[number][0]

    def item(self, number: int) -> FoundItem:
        """An item. Raises SampleError where it can no longer be read, or an image is no longer there."""
        sample, position = self.first[number]
        item, root = self.records.pair(sample).items[position], self.records.root(sample)
        images = zip(item.images, self.sizes[number], strict=True)
        return FoundItem(item, root, tuple(locate(image, root, size) for image, size in images))

    def used(self, policy: FaultPolicy) -> tuple[Indices, list[Reason]]:
        """The indices of the samples that are used, and the index and reason of every other one.

        Raises UserError naming the place and the reason of every sample that `policy` refuses.
        """
        skipped = left_out(self.records, self.faults, self.long, policy)
        is_left_out = {index for index, _ in (*skipped, *self.long)}
        used = [index for index in self.pairs if index not in is_left_out]
        reasons = sorted([*skipped, *self.long])
        if not used:
            raise UserError(
                [f"{self.records.place(index)}: dropped, no sample is left: {reason}" for index, reason in reasons]
            )
        return np.array(used, np.int64), reasons


def read_pairs(
    records: RecordSet, limit: ItemLimit | None = None, decode_images: bool = True, progress: Progress = QUIET
) -> PairData:
    """Read and check every record. `limit`: without it lengths are not checked. Nothing is raised for a sample."""
    data, reading = PairData(records), _Reading(limit, decode_images)
    with progress.task("reading pairs", len(records)) as task:
        for start in range(0, len(records), _AT_ONCE):
            reading.add(data, range(start, min(start + _AT_ONCE, len(records))))
            task.advance(min(_AT_ONCE, len(records) - start))
    return data


class _Reading:
    """Adds records to a PairData, some at a time."""

    def __init__(self, limit: ItemLimit | None, decode_images: bool) -> None:
        self._limit = limit
        self._decode_images = decode_images
        self._number: dict[str, int] = {}
        self._reason_of: dict[int, str] = {}
        """By item number, why a sample with it cannot be used."""

    def add(self, data: PairData, indices: Sequence[int]) -> None:
        found: dict[int, tuple[Pair, list[FoundItem]]] = {}
        for index in indices:
            try:
                pair, root = data.records.pair(index), data.records.root(index)
                found[index] = pair, [find_item(item, root) for item in pair.items]
            except SampleError as error:
                data.faults.append((index, str(error)))
        failed = self._failed_images([item for _, items in found.values() for item in items])
        sound = {}
        for index, (pair, items) in found.items():
            reasons = [failed[image.source] for item in items for image in item.images if image.source in failed]
            data.faults += [(index, reason) for reason in dict.fromkeys(reasons)]
            if not reasons:
                sound[index] = pair, items
        self._number_all(data, sound)

    def _failed_images(self, items: Sequence[FoundItem]) -> dict[Path | bytes, str]:
        images = [image for item in items for image in item.images]
        return images_that_fail(images, _THREADS) if self._decode_images and images else {}

    def _number_all(self, data: PairData, found: dict[int, tuple[Pair, list[FoundItem]]]) -> None:
        keys = iter(content_keys([item for _, items in found.values() for item in items]))
        for index, (pair, items) in found.items():
            numbers = []
            for position, item in enumerate(items):
                numbers.append(self._number_of(data, next(keys), item, (index, position)))
            ends = 1 + len(pair.positives)
            long = [data.num_tokens[number] for number in numbers if self._is_long(data.num_tokens[number])]
            if reasons := [self._reason_of[number] for number in numbers if number in self._reason_of]:
                data.faults += [(index, reason) for reason in dict.fromkeys(reasons)]
                continue
            if long and self._limit is not None:
                data.long.append((index, self._limit.limit.reason(max(long))))
            data.pairs[index] = PairItems(numbers[0], tuple(numbers[1:ends]), tuple(numbers[ends:]), pair.group)

    def _is_long(self, num_tokens: int) -> bool:
        return self._limit is not None and num_tokens > self._limit.limit.num_tokens

    def _number_of(self, data: PairData, key: str, item: FoundItem, place: tuple[int, int]) -> int:
        number = self._number.setdefault(key, data.num_items)
        if number == data.num_items:
            data.keys.append(key)
            data.first.append(place)
            data.sizes.append(tuple(image.size for image in item.images))
            data.num_tokens.append(self._count(number, item))
        return number

    def _count(self, number: int, item: FoundItem) -> int:
        if self._limit is None:
            return 0
        try:
            return self._limit.num_tokens(item)
        except SampleError as error:
            self._reason_of[number] = str(error)
            return 0
