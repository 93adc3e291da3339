"""All samples of a split as they are stored for training, and which of them the config selects."""

from dataclasses import dataclass

import numpy as np

from mmtrain.config import Config
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import Selected, SelectedSources, select
from mmtrain.dataset.store import open_store
from mmtrain.dataset.validate import LengthLimit
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress


@dataclass(frozen=True, slots=True)
class SelectedSamples:
    samples: StoredSamples
    limit: LengthLimit
    used: Indices
    """Those that training or evaluation uses: none that is faulty or too long."""
    left_out: Selected
    """What the config does not select of those that could be used."""


def open_selected(config: Config, split: str, processor: ChatProcessor, progress: Progress) -> SelectedSamples:
    """The samples of `split` ("train" or "eval"), encoded if they are not stored.

    Raises UserError where a source cannot be read.
    """
    selected = selected_sources(config, split)
    spec = EncodingSpec.of(config, selected.sources)
    records = spec.records()
    store = open_store(spec, records, processor, progress)
    samples = StoredSamples.of(records, store)
    limit = length_limit(config.model.path, config.data.max_length)
    possible = np.flatnonzero((store.num_tokens > 0) & (store.num_tokens <= limit.num_tokens))
    possible = np.setdiff1d(possible, [fault.index for fault in store.faults])
    left_out = select(samples, possible, selected.choices)
    return SelectedSamples(samples, limit, np.setdiff1d(possible, left_out.indices), left_out)


def selected_sources(config: Config, split: str) -> SelectedSources:
    """The sources of `split` ("train" or "eval"). Raises UserError where there are none."""
    data = config.data
    if not getattr(data, split):
        raise UserError(f"data.{split}: there are no sources in the config")
    if split == "train":
        return SelectedSources.for_training(data)
    return SelectedSources.for_evaluation(data, data.eval)
