"""The pairs of some sources, checked, and their items, each distinct one encoded once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmtrain.config.data_section import Data, Source
from mmtrain.contrastive.embedder import Embedder, EncodedItem
from mmtrain.contrastive.relation import PairItems
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.pair_items import item_keys
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.validate import FaultPolicy, LeftOut, LengthLimit, leave_out, nothing_left
from mmtrain.dataset.workers import num_cores
from mmtrain.encoding.images import FoundImage, Roots, locate
from mmtrain.progress import QUIET, Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item, Pair
from mmtrain.records.record_set import RecordSet
from mmtrain.records.sources.place import Place

_CHUNK = 256
_NOT_LOADED = b""


@dataclass(frozen=True, slots=True)
class PairSamples:
    """Pairs by index, and their distinct items by number."""

    records: RecordSet
    pairs: dict[int, PairItems]
    """The pairs that are used, by sample index."""
    items: list[EncodedItem]
    """Without the bytes of images that are not files of their own: `loaded` reads them."""
    first: list[tuple[int, int]]
    """Of each item, the first sample that has it, and its position in `Pair.items` of that sample."""
    dropped: tuple[LeftOut, ...]
    """As too long."""
    skipped: tuple[LeftOut, ...]
    """Because of faults."""
    instructions: dict[str, frozenset[str]]
    """Those of a `query` and of a `document`; "" where there is none."""
    num_other_side: int = 0
    """Pairs on the other side of the split into training and held-out ones."""

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

    def loaded(self, numbers: Iterable[int]) -> list[EncodedItem]:
        """Items with their images. Raises SampleError where a record can no longer be read."""
        return [self._loaded(number) for number in numbers]

    def _loaded(self, number: int) -> EncodedItem:
        item = self.items[number]
        if not any(span.image.source == _NOT_LOADED for span in item.encoded.images):
            return item
        sample, position = self.first[number]
        images, roots = self.records.pair(sample).items[position].images, self.records.roots(sample)
        found = iter([locate(one, roots, own.image.size) for one, own in zip(images, item.encoded.images, strict=True)])
        return _with_images(item, lambda _: next(found))

    def without(self, indices: Iterable[int]) -> "PairSamples":
        """The same with these pairs on the other side of a split: without the items that only they have."""
        other = set(indices)
        kept = {index: pair for index, pair in self.pairs.items() if index not in other}
        old = sorted({number for pair in kept.values() for number in pair.numbers})
        new = {number: position for position, number in enumerate(old)}
        return replace(
            self,
            pairs={index: pair.renumbered(new) for index, pair in kept.items()},
            items=[self.items[number] for number in old],
            first=[self.first[number] for number in old],
            num_other_side=len(other),
        )


def read_pairs(
    sources: Sequence[Source],
    embedder: Embedder,
    data: Data,
    progress: Progress = QUIET,
    policy: FaultPolicy | None = None,
) -> PairSamples:
    """Every pair of the sources, read as `data` says, its items encoded for `embedder`.

    Raises UserError naming the file, the line and the reason of every sample that cannot be used, except those that
    `policy`, by default that of `data`, drops or skips.
    """
    records = RecordSet(sources, frozenset(data.ignore_fields))
    table = _Table(embedder, embedder.limit(data.max_length), data.decode_images)
    for start in range(0, len(records), _CHUNK):
        table.add(records, range(start, min(start + _CHUNK, len(records))))
        progress.tick()
    dropped, skipped = leave_out(records, table.faults, table.long, policy or FaultPolicy.of(data))
    for index, _ in (*dropped, *skipped):
        table.pairs.pop(index, None)
    if not table.pairs:
        raise nothing_left(records, dropped, skipped)
    instructions = {side: frozenset(found) for side, found in table.instructions.items()}
    return PairSamples(records, table.pairs, table.items, table.first, tuple(dropped), tuple(skipped), instructions)


class _Table:
    """Pairs and distinct items, collected chunk by chunk."""

    def __init__(self, embedder: Embedder, limit: LengthLimit, decode_images: bool) -> None:
        self._embedder, self._limit, self._decode_images = embedder, limit, decode_images
        self._number_of: dict[str, int] = {}
        self.items: list[EncodedItem] = []
        self.first: list[tuple[int, int]] = []
        self.pairs: dict[int, PairItems] = {}
        self.faults: list[LeftOut] = []
        self.long: list[LeftOut] = []
        self.instructions: dict[str, set[str]] = {"query": set(), "document": set()}

    def add(self, records: RecordSet, indices: Sequence[int]) -> None:
        read: dict[int, Pair] = {}
        for index in indices:
            try:
                read[index] = records.pair(index)
            except SampleError as error:
                self.faults.append((index, str(error)))
        every = [(index, item) for index, pair in read.items() for item in pair.items]
        encoded = self._embedder.encode([(item, records.roots(index)) for index, item in every])
        if self._decode_images:
            encoded = _decoded(encoded)
        keys = _keys([(item, records.roots(index)) for index, item in every], encoded)
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
        sound = [(one, key) for one, key in items if isinstance(one, EncodedItem)]
        numbers = [self._number(one, key, (index, position)) for position, (one, key) in enumerate(sound)]
        for number, item in enumerate(pair.items):
            self.instructions["document" if number else "query"].add(item.instruction or "")
        end = 1 + len(pair.positives)
        self.pairs[index] = PairItems(numbers[0], tuple(numbers[1:end]), tuple(numbers[end:]), pair.group)

    def _number(self, item: EncodedItem, key: str, at: tuple[int, int]) -> int:
        number = self._number_of.setdefault(key, len(self.items))
        if number == len(self.items):
            self.items.append(_with_images(replace(item, key=key), _without_bytes))
            self.first.append(at)
        return number


def _decoded(items: Sequence[EncodedItem | SampleError]) -> list[EncodedItem | SampleError]:
    """The items, and the reason in the place of each that has an image that does not decode."""
    images = [span.image for item in items if isinstance(item, EncodedItem) for span in item.encoded.images]
    failing = images_that_fail(images, num_cores()) if images else {}
    return [_reason(item, failing) or item for item in items]


def _reason(item: EncodedItem | SampleError, failing: dict[Path | bytes, str]) -> SampleError | None:
    if isinstance(item, SampleError):
        return item
    reasons = (failing.get(span.image.source) for span in item.encoded.images)
    return next((SampleError(reason) for reason in reasons if reason), None)


def _with_images(item: EncodedItem, make: Callable[[FoundImage], FoundImage]) -> EncodedItem:
    spans = tuple(replace(span, image=make(span.image)) for span in item.encoded.images)
    return replace(item, encoded=replace(item.encoded, images=spans))


def _without_bytes(image: FoundImage) -> FoundImage:
    return replace(image, source=_NOT_LOADED) if isinstance(image.source, bytes) else image


def _keys(items: Sequence[tuple[Item, Roots]], encoded: Sequence[EncodedItem | SampleError]) -> list[str]:
    """The content key of each item, empty where it could not be encoded."""
    good = [item for item, one in zip(items, encoded, strict=True) if isinstance(one, EncodedItem)]
    keys = iter(item_keys(good))
    return [next(keys) if isinstance(one, EncodedItem) else "" for one in encoded]
