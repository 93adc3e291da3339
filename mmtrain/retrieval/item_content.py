"""What the items of pairs say, and where: read again from their records where a report shows them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.encoding.images import FoundImage
from mmtrain.records.pairs import Item


@dataclass(frozen=True, slots=True)
class ItemContent:
    """Items by number."""

    samples: PairSamples
    first: dict[int, tuple[int, int]]
    """Of each item, the first sample that has it, and its position in the sample's `Pair.items`."""

    @classmethod
    def of(cls, samples: PairSamples, indices: Iterable[int]) -> "ItemContent":
        """The items of these samples."""
        first: dict[int, tuple[int, int]] = {}
        for index in indices:
            for position, number in enumerate(samples.pairs[index].numbers):
                first.setdefault(number, (index, position))
        return cls(samples, first)

    def item(self, number: int) -> Item:
        sample, position = self.first[number]
        return self.samples.records.pair(sample).items[position]

    def images(self, number: int) -> tuple[FoundImage, ...]:
        """Raises SampleError where the record can no longer be read."""
        return tuple(span.image for span in self.samples.loaded([number])[0].encoded.images)

    def row(self, number: int) -> dict[str, Any]:
        """The item as plain data."""
        item = self.item(number)
        return {
            "number": number,
            "place": str(self.samples.place(self.first[number][0])),
            "text": item.text,
            "images": [image.name for image in item.images],
        }
