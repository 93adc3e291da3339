"""The pairs of a data set, every record read and checked, with each distinct item numbered once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mmtrain.contrastive.relation import PairItems
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.pair_items import FoundItem, content_keys, find_item
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.validate import FaultPolicy, Reason, left_out
from mmtrain.encoding.images import locate
from mmtrain.errors import UserError
from mmtrain.progress import QUIET, Progress
from mmtrain.records.chat import SampleError, TooLongError
from mmtrain.records.pairs import Item, Pair
from mmtrain.records.record_set import RecordSet

ItemKind = Literal["text", "image", "both"]
_AT_ONCE = 512
"""Records whose images are in memory at once, where they are not files of their own."""
_THREADS = 4


Encode = Callable[[Sequence[tuple[Item, Path, str]]], Sequence[object]]
"""What the model makes of items, each with the folder of its images and its content key: for each something else than
a SampleError, or the SampleError that says why it cannot be used; TooLongError if only for its length."""


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
    first: list[tuple[int, int]] = field(default_factory=list)
    """Of each item, the sample that first has it, and its position in `Pair.items` of that sample."""
    sizes: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    """Of each item, the size of its images."""
    kinds: list[ItemKind] = field(default_factory=list)
    """What each item is."""

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
    records: RecordSet, encode: Encode | None = None, decode_images: bool = True, progress: Progress = QUIET
) -> PairData:
    """Read and check every record. `encode`: tries every distinct item. Nothing is raised for a sample."""
    data, reading = PairData(records), _Reading(encode, decode_images)
    with progress.task("reading pairs", len(records)) as task:
        for start in range(0, len(records), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(records)))
            reading.add(data, indices)
            task.advance(len(indices))
    return data


class _Reading:
    """Adds records to a PairData, some at a time."""

    def __init__(self, encode: Encode | None, decode_images: bool) -> None:
        self._encode = encode
        self._decode_images = decode_images
        self._number: dict[str, int] = {}
        self._errors: dict[int, SampleError] = {}
        """By item number, why it cannot be used."""

    def add(self, data: PairData, indices: Sequence[int]) -> None:
        found: dict[int, tuple[Pair, list[FoundItem]]] = {}
        for index in indices:
            try:
                pair, root = data.records.pair(index), data.records.root(index)
                found[index] = pair, [find_item(item, root) for item in pair.items]
            except SampleError as error:
                data.faults.append((index, str(error)))
        failed = self._failed_images([item for _, items in found.values() for item in items])
        for index, (_, items) in list(found.items()):
            reasons = [failed[image.source] for item in items for image in item.images if image.source in failed]
            if reasons:
                data.faults += [(index, reason) for reason in dict.fromkeys(reasons)]
                del found[index]
        numbers = self._numbers(data, found)
        for index, (pair, _) in found.items():
            self._add_pair(data, index, pair, numbers[index])

    def _failed_images(self, items: Sequence[FoundItem]) -> dict[Path | bytes, str]:
        images = [image for item in items for image in item.images]
        return images_that_fail(images, _THREADS) if self._decode_images and images else {}

    def _numbers(self, data: PairData, found: dict[int, tuple[Pair, list[FoundItem]]]) -> dict[int, list[int]]:
        """By sample the number of each of its items, new ones being added to `data` and tried."""
        keys = iter(content_keys([item for _, items in found.values() for item in items]))
        numbers: dict[int, list[int]] = {}
        new: list[tuple[Item, Path, str]] = []
        for index, (_, items) in found.items():
            numbers[index] = []
            for position, item in enumerate(items):
                key = next(keys)
                number = self._number.setdefault(key, data.num_items)
                numbers[index].append(number)
                if number == data.num_items:
                    new.append((item.item, item.root, key))
                    data.keys.append(key)
                    data.first.append((index, position))
                    data.sizes.append(tuple(image.size for image in item.images))
                    data.kinds.append("text" if not item.images else "image" if item.item.text is None else "both")
        made = self._encode(new) if self._encode is not None else []
        first = data.num_items - len(new)
        self._errors |= {first + i: error for i, error in enumerate(made) if isinstance(error, SampleError)}
        return numbers

    def _add_pair(self, data: PairData, index: int, pair: Pair, numbers: Sequence[int]) -> None:
        errors = [self._errors[number] for number in numbers if number in self._errors]
        faults = [str(error) for error in errors if not isinstance(error, TooLongError)]
        if faults:
            data.faults += [(index, reason) for reason in dict.fromkeys(faults)]
            return
        if errors:
            data.long.append((index, str(errors[0])))
        end = 1 + len(pair.positives)
        data.pairs[index] = PairItems(numbers[0], tuple(numbers[1:end]), tuple(numbers[end:]), pair.group)
