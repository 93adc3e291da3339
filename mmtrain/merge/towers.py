"""Merges an adapter into a dual encoder: the embeddings are compared, in place of logits."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mmtrain.atomic_files import new_folder
from mmtrain.contrastive.sentence_folder import FILES
from mmtrain.contrastive.towers import Towers
from mmtrain.encoding.tower_processor import TowerProcessor, load_tower_processor
from mmtrain.merge.comparison import check_difference
from mmtrain.merge.stored import MAX_MERGED, MAX_ROUNDED, check_weights, name_of, write
from mmtrain.merge.weights import cast, merge_weights
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.load import load_weights
from mmtrain.model.named_model import NamedModel
from mmtrain.progress import Progress
from mmtrain.safe_text import visible


def merge_towers(source: NamedModel, output: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Write the dual encoder that `source` makes to `output`, a new directory, in `dtype`.

    Raises UserError, and leaves nothing at `output`, if the result has other embeddings.
    """
    assert source.adapter is not None
    processor = load_tower_processor(source.path, source.processor_settings.image_processor)
    progress.say("merging in float32")
    towers = _towers(load_weights(source.path, "float32"), processor)
    adapted = load_adapter(towers.model, read_adapter(source.adapter))  # which changes the model of `towers` in place
    expected = towers.probe()
    merged = merge_weights(adapted)
    difference = check_difference(towers.probe(), expected, MAX_MERGED, "embeddings")
    cast(merged, dtype)
    with new_folder(output) as made:
        write(made, merged, source, processor)
        _copy_sentence_files(source.adapter, made)
        saved = load_weights(str(made), name_of(dtype))
        check_weights(saved, merged)
        found = _towers(saved.float(), processor).probe()
        rounded = check_difference(found, expected, MAX_ROUNDED[dtype], "embeddings")
    progress.say(
        f"saved {visible(str(output))} in {name_of(dtype)}; its embeddings of random images and texts differ from "
        f"base + adapter by {difference:.1e} before and {rounded:.1e} after the cast (relative, computed in float32)"
    )
    progress.say("transformers and others load it like the base model")


def _towers(model: Any, processor: TowerProcessor) -> Towers:
    return Towers(model, processor, nullcontext)


def _copy_sentence_files(adapter: Path, folder: Path) -> None:
    """Those by which sentence-transformers loads the adapter also load the merged model. Raises OSError."""
    for file in FILES:
        if (adapter / file).is_file():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(adapter / file, folder / file)
