"""What is merged: the adapter of a run or of a directory with its base model, and samples to compare the result on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.shard_order import first_file
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.adapter import find_adapter_folder
from mmtrain.model.load import length_limit
from mmtrain.model.named_model import NamedModel, find_named
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line, visible

NUM_SAMPLES = 4
"""Samples of the run on which the merged model is compared."""


def find_source(path: Path, base: str | None) -> NamedModel:
    """The base model with the adapter that `path`, the directory of a run or of an adapter, names, in float32. `base`:
    another base model than it names.

    Raises UserError if there is no adapter, or no base model is named.
    """
    if (path / "model" / "config.json").is_file():
        raise UserError(f"{visible(str(path / 'model'))}: a complete model was trained, there is nothing to merge")
    find_adapter_folder(path)
    return find_named(str(path), base, "float32")


def samples_of_run(source: NamedModel, processor: ChatProcessor, say: Callable[[str], None]) -> list[Encoded]:
    """Up to NUM_SAMPLES training samples, evenly spaced, as training encodes them.

    Empty if there is no run or none of its samples can be read; `say` is given the reason in one line.
    """
    config = source.config
    if config is None:
        say("no run is known for this adapter: the logits are compared on random samples")
        return []
    limit = length_limit(source.path, config.data.max_length).num_tokens
    found, reason = [], "they are too long"
    try:
        config = first_file(config, say)
        spec = EncodingSpec.of(config, config.data.train)
        records, encoder = spec.records(), spec.encoder(processor)
        for index in np.unique(np.linspace(0, len(records) - 1, NUM_SAMPLES).astype(int)).tolist():
            _, conversation = encoder.sequences(records.conversation(index))[-1]
            encoded = encoder.encode(conversation, records.roots(index))
            if encoded.num_tokens <= limit:
                found.append(encoded)
    except (UserError, SampleError) as error:
        reason = one_line(error)
    if not found:
        say(f"the run's samples cannot be used ({reason}): the logits are compared on random samples")
    return found
