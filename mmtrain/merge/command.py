"""`mmtrain merge`: one model from a base model and an adapter, compared with both before it is called done."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmtrain.atomic_files import check_new, new_folder
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.merge.comparison import Comparison
from mmtrain.merge.source import MergeSource, find_source, samples_of_run
from mmtrain.merge.stored import MAX_MERGED, MAX_ROUNDED, check_weights, name_of, stored_dtype, write
from mmtrain.merge.towers import merge_towers
from mmtrain.merge.weights import cast, dequantized, merge_weights, untie
from mmtrain.model.adapter import Adapter, load_adapter
from mmtrain.model.load import load_model
from mmtrain.model.packing_trial import random_samples
from mmtrain.progress import Progress
from mmtrain.safe_text import visible


def merge(path: Path, output: Path, base: str | None = None) -> None:
    """Write the model that the adapter at `path` and its base model make to `output`, a new directory.

    Raises UserError, and leaves nothing at `output`, if they cannot be merged or the result is not the same model.
    """
    name, progress = visible(str(output)), Progress()
    check_new(output, "directory")
    source = find_source(path, base)
    dtype = stored_dtype(source.base)
    if source.is_dual_encoder:
        merge_towers(source, output, dtype, progress)
        return
    processor = load_processor(source.base, source.processor_settings)
    samples = samples_of_run(source, processor, progress.say)
    progress.say("merging in float32")
    comparison, adapted = _load(source, processor, samples)
    for layer in untie(adapted):
        progress.say(f"{layer} shares its weight with another layer: it is stored with a weight of its own")
    merged = merge_weights(adapted)
    difference = comparison.check(merged, MAX_MERGED)
    cast(merged, dtype)
    with new_folder(output) as made:
        write(made, merged, source, processor)
        rounded = _check_written(made, merged, processor, comparison)
    what = f"{len(samples)} samples of the run" if samples else "random samples"
    progress.say(
        f"saved {name} in {name_of(dtype)}; on {what} its logits differ from base + adapter by {difference:.1e} before "
        f"and {rounded:.1e} after the cast (relative, computed in float32)"
    )
    progress.say("transformers, vLLM and others load it like the base model")


def _load(source: MergeSource, processor: ChatProcessor, samples: list[Encoded]) -> tuple[Comparison, PeftModel]:
    """Base + adapter in float32, and its logits on the samples.

    A base model that was quantized for training is dequantized after that: its weights, not the original ones, are
    those that the adapter was trained with.
    """
    quantization = None if source.config is None else source.config.model.quantization
    model = load_model(source.base, "float32", processor, quantization=quantization)
    comparison = Comparison(samples or random_samples(model, processor), processor)
    adapted = _adapted(model, source.adapter)
    comparison.expect(adapted)
    if quantization is not None:
        model = load_model(source.base, "float32", processor, quantization=quantization)
        adapted = _adapted(dequantized(model), source.adapter)
    return comparison, adapted


def _adapted(model: Any, adapter: Adapter) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")  # `untie` solves it
        return load_adapter(model, adapter)


def _check_written(folder: Path, merged: Any, processor: ChatProcessor, comparison: Comparison) -> float:
    """Load what was written: the relative difference of its logits from those of base + adapter.

    Raises UserError unless every weight is the merged one.
    """
    saved = load_model(str(folder), name_of(merged.dtype), processor)
    check_weights(saved, merged)
    return comparison.check(saved.float(), MAX_ROUNDED[merged.dtype])
