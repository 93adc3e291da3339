"""A few samples of a data set as training reads them, with what its checks find wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.checks.findings import REFUSED
from mmtrain.config import Config
from mmtrain.dataset.encode_all import ChunkEncoder, EncodingSpec
from mmtrain.dataset.samples import FreshSamples, StoredSamples
from mmtrain.dataset.selection import SelectedSources, select
from mmtrain.dataset.store import find_store, open_store
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.view import SampleView, view_sample
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.record_set import RecordSet


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """`samples` are the whole set, `views` those chosen samples that can be encoded."""

    samples: StoredSamples | FreshSamples
    processor: ChatProcessor
    views: tuple[SampleView, ...]
    faults: tuple[str, ...]
    """One line for each fault of a chosen sample."""


def look_at(config: Config, split: str, choose: Callable[[int, Sequence[int]], list[int]]) -> ChosenSamples:
    """Samples of `split` ("train" or "eval"). `choose` is given the number of samples and the indices of those that
    the config selects, and gives the indices of those to look at.

    Raises UserError where a source cannot be read, or a sample is no longer what is stored for training.
    """
    selected = selected_sources(config, split)
    spec, processor = EncodingSpec.of(config, selected.sources), load_processor(config.model.path)
    records, encoder = spec.records(), spec.encoder(processor)
    indices = choose(len(records), _used(spec, records, processor, selected))
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


def selected_sources(config: Config, split: str) -> SelectedSources:
    """The sources of `split` ("train" or "eval"). Raises UserError where there are none."""
    data = config.data
    if not getattr(data, split):
        raise UserError(f"data.{split}: there are no sources in the config")
    return (
        SelectedSources.for_training(data)
        if split == "train"
        else SelectedSources.for_evaluation(data, config.data.eval)
    )


def _used(spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, selected: SelectedSources) -> Sequence[int]:
    """The samples that the config selects. To know them all samples must be encoded."""
    if selected.is_everything:
        return range(len(records))
    samples = StoredSamples(records, open_store(spec, records, processor, Progress()))
    possible = np.flatnonzero(samples.store.num_tokens)
    left_out = select(samples, possible, selected.choices).indices
    used: list[int] = np.setdiff1d(possible, left_out).tolist()
    return used
