"""`mmtrain merge`: one model from a base model and an adapter, compared with both before it is called done."""

from pathlib import Path
from typing import Any

from mmtrain.atomic_files import check_new, new_folder
from mmtrain.encoding.directory import is_dual_encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.merge.comparison import Comparison, load_compared
from mmtrain.merge.source import find_source, samples_of_run
from mmtrain.merge.stored import MAX_MERGED, MAX_ROUNDED, check_room_for, check_weights, name_of, stored_dtype, write
from mmtrain.merge.towers import merge_towers
from mmtrain.merge.weights import cast, merge_weights, untie
from mmtrain.model.load import load_config, load_model
from mmtrain.progress import Progress
from mmtrain.safe_text import counted, visible


def merge(path: Path, output: Path, base: str | None = None) -> None:
    """Write the model that the adapter at `path` and its base model make to `output`, a new directory.

    Raises UserError, and leaves nothing at `output`, if they cannot be merged or the result is not the same model.
    """
    name, progress = visible(str(output)), Progress()
    check_new(output, "directory")
    source = find_source(path, base)
    dtype = stored_dtype(source.path)
    check_room_for(output, source.path)
    if is_dual_encoder(load_config(source.path)):
        merge_towers(source, output, dtype, progress)
        return
    processor = load_processor(source.path, source.processor_settings)
    samples = samples_of_run(source, processor, progress.say)
    progress.say("merging in float32")
    comparison, adapted = load_compared(source, processor, samples)
    for layer in untie(adapted):
        progress.say(f"{layer} shares its weight with another layer: it is stored with a weight of its own")
    merged = merge_weights(adapted)
    difference = comparison.check(merged, MAX_MERGED)
    cast(merged, dtype)
    with new_folder(output) as made:
        write(made, merged, source, processor)
        rounded = _check_written(made, merged, processor, comparison)
    what = f"{counted(len(samples), 'sample')} of the run" if samples else "random samples"
    progress.say(
        f"saved {name} in {name_of(dtype)}; on {what} its logits differ from base + adapter by {difference:.1e} before "
        f"and {rounded:.1e} after the cast (relative, computed in float32)"
    )
    progress.say("transformers, vLLM and others load it like the base model")


def _check_written(folder: Path, merged: Any, processor: ChatProcessor, comparison: Comparison) -> float:
    """Load what was written: the relative difference of its logits from those of base + adapter.

    Raises UserError unless every weight is the merged one.
    """
    saved = load_model(str(folder), name_of(merged.dtype), processor)
    check_weights(saved, merged)
    return comparison.check(saved.float(), MAX_ROUNDED[merged.dtype])
