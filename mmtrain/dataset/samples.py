"""Samples by index, as the store has them."""

from dataclasses import dataclass

from mmtrain.dataset.store_file import EncodedStore
from mmtrain.encoding.encode import Encoded, ImageSpan
from mmtrain.encoding.images import locate
from mmtrain.records.record_set import RecordSet
from mmtrain.records.sources.place import Place


@dataclass(frozen=True, slots=True)
class StoredSamples:
    """Records, and what they were encoded to."""

    records: RecordSet
    store: EncodedStore

    @classmethod
    def of(cls, records: RecordSet, store: EncodedStore) -> "StoredSamples":
        """The samples that all of `records` were encoded to."""
        return cls(records.sequences(store.records, store.turns), store)

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> Place:
        return self.records.place(index)

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError where an image is no longer there."""
        ids, supervised = self.store.tokens(index)
        rows = self.store.spans_of(index).tolist()
        images = self.records.conversation(index).images if rows else ()
        roots = self.records.roots(index)
        spans = [
            ImageSpan(locate(image, roots, (width, height)), start, length, num_placeholders)
            for image, (start, length, num_placeholders, width, height) in zip(images, rows, strict=True)
        ]
        return Encoded(ids, supervised, tuple(spans), self.store.weights_of(index))
