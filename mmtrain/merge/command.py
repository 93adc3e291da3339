"""`mmtrain merge`: one model from a base model and an adapter, compared with both before it is called done."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mmtrain.atomic_files import move_into_place, temporary_path
from mmtrain.encoding.directory import copy_processor, files_in, model_directory
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError, storage_faults
from mmtrain.merge.comparison import Comparison
from mmtrain.merge.source import MergeSource, find_source, samples_of_run
from mmtrain.merge.weights import GENERATION, cast, dequantized, merge_weights, save, untie
from mmtrain.model.adapter import Adapter, load_adapter
from mmtrain.model.load import auto_class, load_config, load_model
from mmtrain.model.packing_trial import random_samples
from mmtrain.progress import Progress
from mmtrain.safe_text import shown, visible
from mmtrain.train.model_card import merged_card

MAX_MERGED = 1e-4
"""Largest relative difference (L2) of the logits of base + adapter and of the merged model, both in float32. Measured:
3e-7; an adapter on a tied head that was not untied gives 3e-2."""
MAX_ROUNDED = {torch.float32: MAX_MERGED, torch.bfloat16: 0.1, torch.float16: 0.1}
"""The same after the weights were rounded once to the type in which they are stored. Measured in bfloat16: 6e-3."""
_ALSO_COPIED = (GENERATION, "LICENSE*", "NOTICE*")


def merge(path: Path, output: Path, base: str | None = None) -> None:
    """Write the model that the adapter at `path` and its base model make to `output`, a new directory.

    Raises UserError, and leaves nothing at `output`, if they cannot be merged or the result is not the same model.
    """
    name, progress = visible(str(output)), Progress()
    if output.exists():
        raise UserError(f"{name}: it exists: give a new directory with -o")
    source = find_source(path, base)
    dtype = _stored_dtype(source.base)
    processor = load_processor(source.base, source.processor_settings)
    samples = samples_of_run(source, processor, progress.say)
    progress.say("merging in float32")
    comparison, adapted = _load(source, processor, samples)
    for layer in untie(adapted):
        progress.say(f"{layer} shares its weight with another layer: it is stored with a weight of its own")
    merged = merge_weights(adapted)
    difference = comparison.check(merged, MAX_MERGED)
    cast(merged, dtype)
    with storage_faults(f"{name}: it cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(output) as made:
            _write(made, merged, source, processor)
            rounded = _check_written(made, merged, processor, comparison)
            move_into_place(output, made)
    what = f"{len(samples)} samples of the run" if samples else "random samples"
    progress.say(
        f"saved {name} in {_name(dtype)}; on {what} its logits differ from base + adapter by {difference:.1e} before "
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


def _stored_dtype(base: str) -> torch.dtype:
    """The type of the base model's weights. Raises UserError if they are quantized."""
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{visible(base)}: its weights are quantized, and an adapter cannot be merged into them: "
            "give the model that was quantized as --base"
        )
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    if dtype not in MAX_ROUNDED:
        raise UserError(f"{visible(base)}: config.json: dtype is {_name(dtype)}: expected float32, bfloat16 or float16")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(folder: Path, merged: Any, source: MergeSource, processor: ChatProcessor) -> None:
    """Write all files of the merged model, also those that are the base model's."""
    save(merged, folder)
    base = model_directory(source.base)
    copy_processor(base, folder, processor.given_template, processor.image_settings)
    for file in files_in(base, _ALSO_COPIED):
        shutil.copyfile(file, folder / file.name)
    auto = auto_class(merged.config).__name__
    card = merged_card(source.base, auto, _name(merged.dtype), source.config, source.run)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _check_written(folder: Path, merged: Any, processor: ChatProcessor, comparison: Comparison) -> float:
    """Load what was written: the relative difference of its logits from those of base + adapter.

    Raises UserError unless every weight is the merged one.
    """
    saved = load_model(str(folder), _name(merged.dtype), processor)
    expected, found = merged.state_dict(), saved.state_dict()
    wrong = [name for name in expected.keys() | found.keys() if not _equal(expected.get(name), found.get(name))]
    if wrong:
        raise UserError(f"loaded back, {len(wrong)} weights are not the merged ones, such as {shown(min(wrong))}")
    return comparison.check(saved.float(), MAX_ROUNDED[merged.dtype])


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)
