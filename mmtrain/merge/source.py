"""What is merged: the adapter of a run or of a directory, its base model, and samples to compare the result on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtrain.config.load import config_of_run
from mmtrain.config.schema import Config
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import FreshSamples
from mmtrain.dataset.shard_order import first_file
from mmtrain.encoding.directory import is_dual_encoder
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.saved_processor import saved_settings
from mmtrain.errors import UserError
from mmtrain.model.adapter import Adapter, base_of, named_base, read_adapter
from mmtrain.model.load import length_limit, load_config
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line, visible

NUM_SAMPLES = 4
"""Samples of the run on which the merged model is compared."""


@dataclass(frozen=True, slots=True)
class MergeSource:
    """An adapter and the base model that it is merged into."""

    adapter: Adapter
    base: str
    """A model directory or the id of a model in the local hub cache."""
    run: Path | None
    """The directory of the run that trained the adapter, if it is known."""
    config: Config | None
    """The run's config."""

    @property
    def is_dual_encoder(self) -> bool:
        """Whether the base model embeds texts and images, and has no logits. Raises UserError."""
        return is_dual_encoder(load_config(self.base))

    @property
    def processor_settings(self) -> ProcessorSettings:
        """Those with which the adapter was trained, if they are saved with it. Raises UserError."""
        return saved_settings(self.adapter.folder, self.base)


def find_source(path: Path, base: str | None) -> MergeSource:
    """What `path`, the directory of a run or of an adapter, names. `base`: another base model than it names.

    Raises UserError if there is no adapter, or no base model is named.
    """
    if (path / "model" / "config.json").is_file():
        raise UserError(f"{visible(str(path / 'model'))}: a complete model was trained, there is nothing to merge")
    adapter = read_adapter(path)
    run = next((one for one in (path, adapter.folder.parent) if (one / "config.yaml").is_file()), None)
    config = None if run is None else config_of_run(run / "config.yaml")
    own = named_base(adapter.folder)  # an absolute path; that in the config can be relative to another directory
    named = None if config is None else config.model.path
    return MergeSource(adapter, base_of(adapter.folder, base or own or named), run, config)


def samples_of_run(source: MergeSource, processor: ChatProcessor, say: Callable[[str], None]) -> list[Encoded]:
    """Up to NUM_SAMPLES training samples, evenly spaced, as training encodes them.

    Empty if there is no run or none of its samples can be read; `say` is given the reason in one line.
    """
    config = source.config
    if config is None:
        say("no run is known for this adapter: the logits are compared on random samples")
        return []
    limit = length_limit(source.base, config.data.max_length).num_tokens
    found, reason = [], "they are too long"
    try:
        config = first_file(config, say)
        spec = EncodingSpec.of(config, config.data.train)
        samples = FreshSamples(spec.records(), spec.encoder(processor))
        for index in np.unique(np.linspace(0, len(samples) - 1, NUM_SAMPLES).astype(int)).tolist():
            encoded = samples.encoded(index)
            if encoded.num_tokens <= limit:
                found.append(encoded)
    except (UserError, SampleError) as error:
        reason = one_line(error)
    if not found:
        say(f"the run's samples cannot be used ({reason}): the logits are compared on random samples")
    return found
