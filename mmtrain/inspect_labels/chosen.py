"""A few samples of a data set as training reads them, with what its checks find wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config import Config
from mmtrain.dataset.encode_all import ChunkEncoder
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store import find_store
from mmtrain.dataset.store_file import temporary_store
from mmtrain.encoding.load import processor_of
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.selected_samples import open_selected, selected_sources
from mmtrain.inspect_labels.view import SampleView, view_sample
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """`samples`: the whole set where it is stored, otherwise the chosen ones; `views`: the chosen ones that can be
    encoded."""

    samples: StoredSamples
    processor: ChatProcessor
    views: tuple[SampleView, ...]
    faults: tuple[str, ...]
    """One line for each fault of a chosen sample."""


def look_at(config: Config, split: str, choose: Callable[[int, Sequence[int]], list[int]]) -> ChosenSamples:
    """Samples of `split` ("train" or "eval"). `choose` is given the number of records and the indices of those that
    the config selects, and gives the indices of those to look at.

    Raises UserError where a source cannot be read, or a sample is no longer what is stored for training.
    """
    spec = EncodingSpec.of(config, selected_sources(config, split).sources)
    processor = processor_of(config.model)
    records, encoder = spec.records(), spec.encoder(processor)
    chosen = choose(len(records), _used(config, split, processor, len(records)))
    chunk = ChunkEncoder(spec, records, processor).encode(chosen)
    # if there is a store, the very encoding that training reads
    store = find_store(spec, records, processor) or temporary_store(chunk)
    samples, encoded = StoredSamples.of(records, store), np.flatnonzero(store.num_tokens)
    indices = [index for record in chosen for index in encoded[store.records[encoded] == record].tolist()]
    try:
        views = tuple(view_sample(samples, encoder, index) for index in indices)
    except SampleError as error:
        raise UserError(f"data: {error}; run the command again once the data has stopped changing") from None
    faults = tuple(
        f"{records.place(int(chunk.records[fault.index]))}: {fault.kind}: {fault.reason}" for fault in chunk.faults
    )
    return ChosenSamples(samples, processor, views, faults)


def _used(config: Config, split: str, processor: ChatProcessor, num_records: int) -> Sequence[int]:
    """The records of the samples that the config selects. To know them all samples must be encoded."""
    if selected_sources(config, split).is_everything:
        return range(num_records)
    found = open_selected(config, split, processor, Progress())
    used: list[int] = np.unique(found.samples.store.records[found.used]).tolist()
    return used
