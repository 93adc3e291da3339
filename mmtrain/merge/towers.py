"""Merges an adapter into a dual encoder: the embeddings are compared, in place of logits."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.atomic_files import move_into_place, temporary_path
from mmtrain.contrastive.sentence_folder import FILES
from mmtrain.contrastive.towers import Towers
from mmtrain.encoding.tower_processor import TowerProcessor, load_tower_processor
from mmtrain.errors import UserError, storage_faults
from mmtrain.merge.source import MergeSource
from mmtrain.merge.stored import MAX_MERGED, MAX_ROUNDED, check_weights, name_of, write
from mmtrain.merge.weights import cast, merge_weights
from mmtrain.model.adapter import load_adapter
from mmtrain.model.load import load_weights
from mmtrain.progress import Progress
from mmtrain.safe_text import visible


def merge_towers(source: MergeSource, output: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Write the dual encoder that `source` makes to `output`, a new directory, in `dtype`.

    Raises UserError, and leaves nothing at `output`, if the result has other embeddings.
    """
    name, processor = visible(str(output)), load_tower_processor(source.base, source.processor_settings.image_processor)
    progress.say("merging in float32")
    towers = _towers(load_weights(source.base, "float32"), processor)
    adapted = load_adapter(towers.model, source.adapter)  # which changes the model of `towers` in place
    expected = towers.probe()
    merged = merge_weights(adapted)
    difference = _check(towers.probe(), expected, MAX_MERGED)
    cast(merged, dtype)
    with storage_faults(f"{name}: it cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(output) as made:
            write(made, merged, source, processor)
            _copy_sentence_files(source.adapter.folder, made)
            saved = load_weights(str(made), name_of(dtype))
            check_weights(saved, merged)
            rounded = _check(_towers(saved.float(), processor).probe(), expected, MAX_ROUNDED[dtype])
            move_into_place(output, made)
    progress.say(
        f"saved {name} in {name_of(dtype)}; its embeddings of random images and texts differ from base + adapter by "
        f"{difference:.1e} before and {rounded:.1e} after the cast (relative, computed in float32)"
    )
    progress.say("transformers and others load it like the base model")


def _towers(model: Any, processor: TowerProcessor) -> Towers:
    return Towers(model, processor, nullcontext)


def _check(found: Tensor, expected: Tensor, limit: float) -> float:
    """The relative difference (L2) of embeddings. Raises UserError if it exceeds `limit`."""
    relative = float((found - expected).norm() / expected.norm())
    if not relative <= limit:
        raise UserError(
            f"the merged model's embeddings differ by {relative:.1e} from those of base + adapter, over the {limit:g} "
            "of rounding: nothing is saved; use the base model with the adapter instead"
        )
    return relative


def _copy_sentence_files(adapter: Path, folder: Path) -> None:
    """Those by which sentence-transformers loads the adapter also load the merged model. Raises OSError."""
    for file in FILES:
        if (adapter / file).is_file():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(adapter / file, folder / file)
