"""The first config for a dual encoder: LoRA on both towers, trained on pairs."""

import math

import numpy as np

from mmtrain.config.data_section import Source
from mmtrain.config.yaml_file import yaml_text
from mmtrain.encoding.tower_processor import load_tower_processor
from mmtrain.errors import UserError
from mmtrain.init.options import InitOptions
from mmtrain.model.load import model_structure
from mmtrain.records.chat import SampleError
from mmtrain.records.record_set import RecordSet
from mmtrain.runtime.device import find_device, has_bfloat16
from mmtrain.safe_text import counted

NUM_READ = 200
"""Pairs of each source that are read, evenly spaced."""
_TEXT = """\
# Written by `mmtrain init`. `mmtrain config show {output}` prints all keys, docs/contrastive.md explains them.

model:
  path: {model}
  dtype: {dtype}

objective: {{kind: contrastive, loss: {loss}, scale: fixed{bias}}}   # an adapter cannot store a trained scale

tune:                            # each component: frozen, lora or full; what is not named is frozen
  vision: {{mode: lora, rank: 16}}
  language: {{mode: lora, rank: 16}}   # the text tower

data:
  train: {train}
{evaluation}
train:
  epochs: {epochs}                       # {pairs}: {steps}
  batch_size: {batch_size}                  # pairs of a step, all compared with each other: decides the result
  learning_rate: 1.0e-4
  warmup_steps: {warmup_steps}

run:
  output_dir: {output_dir}
  microbatch_tokens: {microbatch_tokens}        # lower it when memory runs out: the result stays the same
  eval_every: {every}
  checkpoint_every: {every}
"""


def pair_config_text(options: InitOptions) -> tuple[str, list[str]]:
    """The config for a dual encoder, and a line for each pair that was read and cannot be used. Raises UserError."""
    sizes, faults = zip(*(_read(options.model, path) for path in options.data), strict=True)
    num_pairs = sizes[0]
    batch_size = max(2, min(256, 2 ** int(math.log2(max(2, num_pairs / 10)))))
    epochs = 5 if num_pairs < 10_000 else 1
    device = find_device("auto", "float32")
    with_gpu = device.type == "cuda"
    has_bias = sum(value.numel() == 1 for value in model_structure(options.model).parameters(recurse=False)) > 1
    text = _TEXT.format(
        **options.values(num_pairs, batch_size, epochs),
        dtype="bfloat16" if with_gpu and has_bfloat16(device) else "float32",
        loss="sigmoid" if has_bias else "infonce",
        bias=", bias: fixed" if has_bias else "",
        train=yaml_text(options.train),
        evaluation="" if options.evaluation is None else f"  eval: {yaml_text(options.evaluation)}\n",
        pairs=counted(num_pairs, "pair"),
        microbatch_tokens=16384 if with_gpu else 2048,
    )
    return text, [line for own in faults for line in own]


def _read(model: str, path: str) -> tuple[int, list[str]]:
    """The number of pairs in a source, and a line for each of some that cannot be used."""
    processor = load_tower_processor(model, {})
    records = RecordSet([Source(path=path)])
    faults = []
    tried = np.unique(np.linspace(0, len(records) - 1, NUM_READ).astype(int)).tolist()
    for index in tried:
        try:
            texts = [item.text for item in records.pair(index).items if item.text is not None]
        except SampleError as error:
            faults.append(f"{records.place(index)}: {error}")
            continue
        longest = max(map(len, processor.text_ids(texts)), default=0)
        if longest > processor.max_length:
            faults.append(
                f"{records.place(index)}: {longest} tokens, over the {processor.max_length} of the text tower"
            )
    if len(faults) == len(tried):
        raise UserError([f"{path}: none of the pairs that were tried can be used", *faults])
    return len(records), faults
