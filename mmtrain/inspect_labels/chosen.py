"""A few samples of a data set as training reads them, with what its checks find wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmtrain.checks.findings import REFUSED
from mmtrain.config import Config
from mmtrain.config.schema import Source
from mmtrain.dataset.encode_all import ChunkEncoder, EncodingSpec
from mmtrain.dataset.samples import FreshSamples, StoredSamples
from mmtrain.dataset.store import find_store
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.view import SampleView, view_sample
from mmtrain.records.chat import SampleError


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """`samples` are the whole set, `views` those chosen samples that can be encoded."""

    samples: StoredSamples | FreshSamples
    processor: ChatProcessor
    views: tuple[SampleView, ...]
    faults: tuple[str, ...]
    """One line for each fault of a chosen sample."""


def look_at(config: Config, sources: Sequence[Source], choose: Callable[[int], list[int]]) -> ChosenSamples:
    """`choose` is given the number of samples and gives the indices of those to look at.

    Raises UserError where a source cannot be read, or a sample is no longer what is stored for training.
    """
    spec = EncodingSpec.of(config, sources)
    processor = load_processor(config.model.path, config.model.chat_template)
    records, encoder = spec.records(), spec.encoder(processor)
    indices = choose(len(records))
    found = ChunkEncoder(spec, records, processor).encode(indices).faults
    refused = {fault.index for fault in found if fault.kind == REFUSED}
    store = find_store(spec, records, processor)  # if there is one, the very encoding that training reads
    samples = FreshSamples(records, encoder) if store is None else StoredSamples(records, store)
    try:
        views = tuple(view_sample(samples, encoder, index) for index in indices if index not in refused)
    except SampleError as error:
        raise UserError(f"data: {error}; run the command again once the data has stopped changing") from None
    faults = tuple(f"{records.place(fault.index)}: {fault.kind}: {fault.reason}" for fault in found)
    return ChosenSamples(samples, processor, views, faults)
