"""How a run saves an adapter or a model: the folder, its files, and what is said of it once it is loaded back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mmtrain.config import Config
from mmtrain.encoding.directory import copy_processor, model_directory
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.tower_processor import TowerProcessor
from mmtrain.errors import UserError

MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Largest relative difference (L2) of the logits or embeddings once loaded back. In float32 it is 0 wherever kernels
repeat themselves; in bfloat16 peft rounds components trained in full to the base model's type as it loads them."""


def target_of(model: Any, config: Config, name: str | None) -> Path:
    """The folder `name` in the directory of the run, by default that of an adapter or of a model."""
    return Path(config.run.output_dir) / (name or ("adapter" if isinstance(model, PeftModel) else "model"))


def saved_line(target: Path, difference: float, config: Config, what: str) -> str:
    """What is said of the folder `target`, of which `what` differs by so much (relative, L2) once it is loaded back.
    Raises UserError where that is not rounding."""
    if not difference <= MAX_DIFFERENCE[config.model.dtype]:
        raise UserError(
            f"{target}: loaded back, its {what} differ by {difference:.1e} from the trained model's: do not use it"
        )
    return f"saved {target}; loaded back, its {what} differ by {difference:.1e} (relative)"


def save(
    model: Any,
    processor: ChatProcessor | TowerProcessor,
    config: Config,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter or a model as peft or transformers does, and the files of its processor. `weights`: those to
    write; None: those of `model`, cast to `model.dtype` if it is written whole. Raises OSError."""
    if isinstance(model, PeftModel):
        if Path(config.model.path).is_dir():  # to be found from any directory
            model.peft_config["default"].base_model_name_or_path = str(Path(config.model.path).resolve())
        # else peft would ask the hub whether the vocabulary has grown, and save the base model's head where it has LoRA
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    else:
        if weights is None:
            for parameter in model.parameters():  # `model.to` would drop the imaginary part of complex buffers
                parameter.data = parameter.data.to(getattr(torch, config.model.dtype))
        model.save_pretrained(folder, state_dict=weights)
    base = model_directory(config.model.path)
    copy_processor(base, folder, processor.given_template, processor.image_settings)


@contextmanager
def as_saved(model: PeftModel, folder: Path) -> Iterator[None]:
    """Inside, `model` computes with the adapter in `folder`."""
    model.load_adapter(str(folder), adapter_name="saved", torch_device=str(model.device))
    model.set_adapter("saved")
    try:
        yield
    finally:
        model.set_adapter("default")
        model.delete_adapter("saved")
