"""Saves what was trained: an adapter in peft's own format, or a whole model, each loadable without mmtrain.

What was saved is loaded back and must give the same logits.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.atomic_files import replacing
from mmtrain.config import Config
from mmtrain.dataset.batch import Batch, Loader
from mmtrain.errors import UserError, storage_faults
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.load import auto_class, load_model
from mmtrain.model.quantization import config_as_code
from mmtrain.runtime.shard import whole
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.dataset import Dataset
from mmtrain.train.model_card import model_card
from mmtrain.train.saving import as_saved, save, saved_line, target_of
from mmtrain.train.step import Learner


def export(learner: Learner, config: Config, dataset: Dataset, name: str | None = None, step: int | None = None) -> str:
    """Write the folder `name`, by default `adapter/` (or `model/` where nothing is LoRA), and load it back. Gives a
    line that says what was found. `step`: after which the weights are these; None: the last.

    The logits are compared on the first sample. Where weights are sharded all processes must call this, and the first
    one writes.
    Raises UserError where what was saved is not what was trained, and StorageError where it cannot be written.
    """
    model, runtime = learner.model, learner.runtime
    is_adapter, target = isinstance(model, PeftModel), target_of(model, config, name)
    weights = _whole_weights(model, is_adapter, getattr(torch, config.model.dtype)) if learner.sharded else None
    if not runtime.is_main:
        return ""
    with storage_faults(f"{target}: it cannot be written"), replacing(target) as made:
        save(model, learner.processor, config, made, weights)
        loader, quantization = auto_class(model.config).__name__, config_as_code(model)
        card = model_card(config, loader, is_adapter, dataset.num_trained, quantization, step)
        (made / "README.md").write_text(card, encoding="utf-8")
    if weights is not None:
        _check_equal(target, model, weights)
        return f"saved {target}; read back, every weight is the one that was trained"
    first = int(dataset.checked.used[0])
    batch = Loader(dataset.train, learner.processor, learner.packing, row_multiple=ROW_MULTIPLE).load([first])
    return saved_line(target, _difference(learner, target, config, batch), config, "logits")


def _whole_weights(model: Any, is_adapter: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is saved, gathered on the CPU: an adapter's trainable weights, or all of a model."""
    weights = trainable_parameters(model) if is_adapter else model.state_dict()
    return {
        name: whole(value.detach()).cpu().to(torch.float32 if is_adapter else dtype) for name, value in weights.items()
    }


def _check_equal(target: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Raises UserError where the files at `target` are not `weights`."""
    saved = {name: value for path in target.glob("*.safetensors") for name, value in load_file(path).items()}
    expected = (
        get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
        if isinstance(model, PeftModel)
        else weights
    )
    wrong = [name for name, value in saved.items() if name not in expected or not torch.equal(value, expected[name])]
    if wrong or not saved:
        raise UserError(f"{target}: read back, {len(wrong)} weights are not the trained ones: do not use it")


def _difference(learner: Learner, target: Path, config: Config, batch: Batch) -> float:
    """Relative difference between the logits of the trained model and of what was saved."""
    model = learner.model
    before = _logits(model, learner, learner.make_inputs, batch)
    if isinstance(model, PeftModel):
        with as_saved(model, target):
            after = _logits(model, learner, learner.make_inputs, batch)
    else:
        saved = load_model(str(target), config.model.dtype, learner.processor, model.device)
        after = _logits(saved, learner, InputMaker(saved, learner.processor), batch)
    return float((before - after).norm() / before.norm())


@torch.no_grad()
def _logits(model: Any, learner: Learner, make_inputs: InputMaker, batch: Batch) -> Tensor:
    """(num_supervised, vocabulary) at the batch's supervised tokens."""
    with learner.runtime.autocast():
        inputs = make_inputs(batch)
        kept = batch.supervised.to(inputs["input_ids"].device)
        logits: Tensor = model(**inputs, logits_to_keep=kept).logits
    return logits.float()
