"""Samples that are encoded when they are read, without a store."""

from dataclasses import dataclass

from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.records.record_set import RecordSet
from mmtrain.records.sources.place import Place


@dataclass(frozen=True, slots=True)
class FreshSamples:
    """Records, each encoded on access. Of a record that gives several sequences it is the last one."""

    records: RecordSet
    encoder: Encoder

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> Place:
        return self.records.place(index)

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError with the reason the sample cannot be used."""
        _, conversation = self.encoder.sequences(self.records.conversation(index))[-1]
        return self.encoder.encode(conversation, self.records.roots(index))
