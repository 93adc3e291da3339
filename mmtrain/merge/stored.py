"""A merged model as files: its type, what lies next to the weights, and whether they are read back as they were."""

import shutil
from pathlib import Path
from typing import Any

import torch

from mmtrain.atomic_files import check_room
from mmtrain.encoding.directory import copy_processor, files_in, model_directory
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.tower_processor import TowerProcessor
from mmtrain.errors import UserError
from mmtrain.model.load import auto_class, load_config
from mmtrain.model.named_model import NamedModel
from mmtrain.model.weight_files import GENERATION, differing_weights, num_stored_bytes, save_weights
from mmtrain.safe_text import shown, visible
from mmtrain.train.model_card import merged_card

MAX_MERGED = 1e-4
"""Largest relative difference (L2) of the logits of base + adapter and of the merged model, both in float32. Measured:
3e-7; an adapter on a tied head that was not untied gives 3e-2."""
MAX_ROUNDED = {torch.float32: MAX_MERGED, torch.bfloat16: 0.1, torch.float16: 0.1}
"""The same after the weights were rounded once to the type in which they are stored. Measured in bfloat16: 6e-3."""
_ALSO_COPIED = (GENERATION, "LICENSE*", "NOTICE*")


def stored_dtype(base: str) -> torch.dtype:
    """The type of the base model's weights. Raises UserError if they are quantized."""
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{visible(base)}: its weights are quantized, and an adapter cannot be merged into them: "
            "give the model that was quantized as --base"
        )
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    if dtype not in MAX_ROUNDED:
        raise UserError(
            f"{visible(base)}: config.json: dtype is {name_of(dtype)}: expected float32, bfloat16 or float16"
        )
    return dtype


def check_room_for(output: Path, base: str) -> None:
    """Raises StorageError where a model of the size of `base` does not fit at `output`."""
    check_room(output, num_stored_bytes(model_directory(base)))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(folder: Path, merged: Any, source: NamedModel, processor: ChatProcessor | TowerProcessor) -> None:
    """Write all files of the merged model, also those that are the base model's."""
    save_weights(merged, folder)
    base = model_directory(source.path)
    copy_processor(base, folder, processor.given_template, processor.image_settings)
    for file in files_in(base, _ALSO_COPIED):
        shutil.copyfile(file, folder / file.name)
    auto = auto_class(merged.config).__name__
    card = merged_card(source.path, auto, name_of(merged.dtype), source.config, source.run)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_weights(saved: Any, merged: Any) -> None:
    """Raises UserError unless every weight of `saved`, which was loaded back, is that of `merged`."""
    wrong = differing_weights(saved, merged)
    if wrong:
        raise UserError(f"loaded back, {len(wrong)} weights are not the merged ones, such as {shown(wrong[0])}")
