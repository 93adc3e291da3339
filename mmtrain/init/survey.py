"""What a first config depends on: the data, the size of the model, and the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtrain.config.data_section import Source
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.errors import UserError
from mmtrain.init.options import InitOptions
from mmtrain.model.load import length_limit, model_structure
from mmtrain.records.chat import SampleError
from mmtrain.records.record_set import RecordSet
from mmtrain.runtime.device import find_device, has_bfloat16

NUM_ENCODED = 200
"""Samples of each source that are encoded, evenly spaced, to find how long they are."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found."""

    num_samples: int
    """In the training data."""
    longest: int
    """Tokens of the longest encoded sample, of training and evaluation data."""
    is_complete: bool
    """Whether every sample was encoded."""
    faults: tuple[str, ...]
    """One line for each encoded sample that cannot be used."""
    max_positions: int
    """The longest sample that the model takes, in tokens."""
    num_parameters: int
    gpu_memory: int | None = None
    """Bytes; None without a GPU."""
    has_bfloat16: bool = False
    """Whether the GPU computes in bfloat16."""


def survey(options: InitOptions) -> Survey:
    """Raises UserError if the model or the data cannot be used at all."""
    model = options.model
    processor = load_processor(model, ProcessorSettings(options.chat_template))
    encoder = Encoder(processor)
    lengths: list[int] = []
    faults: list[str] = []
    sizes = []
    for path in options.data:
        records = RecordSet([Source(path=path, prompt=options.prompt)])
        sizes.append(len(records))
        own = _lengths(records, encoder, faults)
        if not own:
            raise UserError([f"{path}: none of the samples that were tried can be used", *faults])
        lengths += own
    device = find_device("auto", "float32")
    with_gpu = device.type == "cuda"
    return Survey(
        num_samples=sizes[0],
        longest=max(lengths),
        is_complete=max(sizes) <= NUM_ENCODED,
        faults=tuple(faults),
        max_positions=length_limit(model).num_tokens,
        num_parameters=sum(parameter.numel() for parameter in model_structure(model).parameters()),
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if with_gpu else None,
        has_bfloat16=with_gpu and has_bfloat16(device),
    )


def _lengths(records: RecordSet, encoder: Encoder, faults: list[str]) -> Sequence[int]:
    """The tokens of evenly spaced samples; `faults` gets a line for each that cannot be encoded."""
    found = []
    for index in np.unique(np.linspace(0, len(records) - 1, NUM_ENCODED).astype(int)).tolist():
        try:
            sequences = [one for _, one in encoder.sequences(records.conversation(index))]
            found.append(max(encoder.encode(one, records.roots(index)).num_tokens for one in sequences))
        except SampleError as error:
            faults.append(f"{records.place(index)}: {error}")
    return found
