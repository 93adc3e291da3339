"""What of a config decides how records are encoded and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtrain.checks.labels import Checker
from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.records.chat import Conversation
from mmtrain.records.formats import read_record
from mmtrain.records.reasoning import without_reasoning
from mmtrain.records.record_set import OpenFile, RecordSet
from mmtrain.records.sources.arrow import read_in_order


@dataclass(frozen=True, slots=True)
class EncodingSpec:
    """What is encoded and how: all that another process needs to do the same."""

    model_path: str
    sources: tuple[Source, ...]
    train_on: str
    end_of_turn: bool
    decode_images: bool = True
    ignored: tuple[str, ...] = ()
    """Keys of records, and marks in their text, that need not be understood."""
    settings: ProcessorSettings = field(default_factory=ProcessorSettings)
    """In place of the model's own."""
    drops_reasoning: bool = False
    """Whether replies are trained on without their reasoning."""

    @classmethod
    def of(cls, config: Config, sources: Sequence[Source]) -> "EncodingSpec":
        labels, data = config.labels, config.data
        return cls(
            config.model.path,
            tuple(sources),
            labels.train_on,
            labels.end_of_turn,
            data.decode_images,
            tuple(sorted(data.ignore_fields)),
            ProcessorSettings.of(config.model),
            labels.reasoning == "drop",
        )

    def records(self, files: Sequence[OpenFile] | None = None) -> RecordSet:
        """The records of these files of the sources; None: of all. Raises UserError where one cannot be read."""
        return RecordSet(self.sources, frozenset(self.ignored), self.drops_reasoning, files)

    def records_in_order(self) -> RecordSet:
        """All records, for a process that reads them in order: few rows of tables stay in its memory."""
        read_in_order()
        return self.records()

    def read(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of a record that is in no file. Raises SampleError where it is none."""
        found = read_record(dict(record), "auto", frozenset(self.ignored))
        return without_reasoning(found) if self.drops_reasoning else found

    def encoder(self, processor: ChatProcessor) -> Encoder:
        return Encoder(processor, self.train_on, self.end_of_turn)

    def checker(self, processor: ChatProcessor) -> Checker:
        return Checker(processor, self.train_on, self.end_of_turn, self.ignored)
