"""The pairs of some sources, checked, and their items, each distinct one encoded once."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmtrain.config.data_section import Source
from mmtrain.contrastive.embedder import Embedder, EncodedItem
from mmtrain.contrastive.relation import PairItems
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.pair_items import content_keys
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.validate import FaultPolicy, LeftOut, LengthLimit, leave_out, nothing_left
from mmtrain.dataset.workers import num_cores
from mmtrain.progress import QUIET, Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item, Pair
from mmtrain.records.record_set import RecordSet
from mmtrain.records.sources.place import Place

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class PairSamples:
    """Pairs by index, and their distinct items by number."""

    records: RecordSet
    pairs: dict[int, PairItems]
    """The pairs that are used, by sample index."""
    items: list[EncodedItem]
    dropped: tuple[LeftOut, ...]
    """As too long."""
    skipped: tuple[LeftOut, ...]
    """Because of faults."""

    @property
    def used(self) -> Indices:
        return np.array(sorted(self.pairs), np.int64)

    @property
    def left_out(self) -> list[LeftOut]:
        """Every sample that is not used, in order, with the reason."""
        return sorted([*self.dropped, *self.skipped])

    @property
    def image_files(self) -> frozenset[Path]:
        """The files of all images."""
        sources = (span.image.source for item in self.items for span in item.encoded.images)
        return frozenset(source for source in sources if isinstance(source, Path))

    def place(self, index: int) -> Place:
        return self.records.place(index)


def read_pairs(
    sources: Sequence[Source],
    embedder: Embedder,
    limit: LengthLimit,
    policy: FaultPolicy,
    ignored: Set[str] = frozenset(),
    decode_images: bool = True,
    progress: Progress = QUIET,
) -> PairSamples:
    """Every pair of the sources, its items encoded for `embedder`.

    Raises UserError naming the file, the line and the reason of every sample that cannot be used, except those that
    `policy` drops or skips. `ignored`: keys of records that need not be understood.
    """
    records = RecordSet(sources, ignored)
    table = _Table(embedder, limit)
    for start in range(0, len(records), _CHUNK):
        table.add(records, range(start, min(start + _CHUNK, len(records))))
        progress.tick()
    if decode_images:
        table.check_images()
    dropped, skipped = leave_out(records, table.faults, table.long, policy)
    for index, _ in (*dropped, *skipped):
        table.pairs.pop(index, None)
    if not table.pairs:
        raise nothing_left(records, dropped, skipped)
    return PairSamples(records, table.pairs, table.items, tuple(dropped), tuple(skipped))


class _Table:
    """Pairs and distinct items, collected chunk by chunk."""

    def __init__(self, embedder: Embedder, limit: LengthLimit) -> None:
        self._embedder, self._limit = embedder, limit
        self._number_of: dict[str, int] = {}
        self.items: list[EncodedItem] = []
        self.pairs: dict[int, PairItems] = {}
        self.faults: list[LeftOut] = []
        self.long: list[LeftOut] = []

    def add(self, records: RecordSet, indices: Sequence[int]) -> None:
        read: dict[int, Pair] = {}
        for index in indices:
            try:
                read[index] = records.pair(index)
            except SampleError as error:
                self.faults.append((index, str(error)))
        every = [(index, item) for index, pair in read.items() for item in pair.items]
        encoded = self._embedder.encode([(item, records.root(index)) for index, item in every])
        keys = _keys([(item, records.root(index)) for index, item in every], encoded)
        found = iter(zip(encoded, keys, strict=True))
        for index, pair in read.items():
            self._add_pair(index, pair, [next(found) for _ in pair.items])

    def _add_pair(self, index: int, pair: Pair, items: Sequence[tuple[EncodedItem | SampleError, str]]) -> None:
        errors = [one for one, _ in items if isinstance(one, SampleError)]
        if errors:
            self.faults.append((index, str(errors[0])))
            return
        longest = max(one.encoded.num_tokens for one, _ in items if isinstance(one, EncodedItem))
        if longest > self._limit.num_tokens:
            self.long.append((index, self._limit.reason(longest)))
            return
        numbers = [self._number(one, key) for one, key in items if isinstance(one, EncodedItem)]
        end = 1 + len(pair.positives)
        self.pairs[index] = PairItems(numbers[0], tuple(numbers[1:end]), tuple(numbers[end:]), pair.group)

    def _number(self, item: EncodedItem, key: str) -> int:
        number = self._number_of.setdefault(key, len(self.items))
        if number == len(self.items):
            self.items.append(replace(item, key=key))
        return number

    def check_images(self) -> None:
        """Add a fault for each pair with an image that does not decode."""
        spans = [span.image for item in self.items for span in item.encoded.images]
        failing = images_that_fail(spans, num_cores())
        if not failing:
            return
        for index, pair in self.pairs.items():
            for number in (pair.query, *pair.positives, *pair.negatives):
                for span in self.items[number].encoded.images:
                    if span.image.source in failing:
                        self.faults.append((index, failing[span.image.source]))


def _keys(items: Sequence[tuple[Item, Path]], encoded: Sequence[EncodedItem | SampleError]) -> list[str]:
    """The content key of each item, empty where it could not be encoded."""
    good = [item for item, one in zip(items, encoded, strict=True) if isinstance(one, EncodedItem)]
    keys = iter(content_keys(good))
    return [next(keys) if isinstance(one, EncodedItem) else "" for one in encoded]
