"""The base model of a config with its trainable parameters, before it is moved to a device."""

from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.components import PartReport, prepare_learning
from mmtrain.model.dropout import DropoutClock, install_dropout
from mmtrain.model.family import Family, probe_family
from mmtrain.model.load import checkpoint_activations, load_model
from mmtrain.progress import Progress
from mmtrain.runtime.activity import Activity


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model on the CPU of which only what `tune` names is trainable."""

    base: Any
    """The model of transformers."""
    model: Any
    """The same, or a PeftModel around it."""
    family: Family
    component_reports: list[PartReport]
    """A row for each component."""
    clock: DropoutClock


def make_trainable(config: Config, processor: ChatProcessor, activity: Activity, progress: Progress) -> TrainableModel:
    """Load the base model, freeze it, and add what is trainable, whose initial weights follow from the seed alone."""
    torch.manual_seed(config.train.seed)
    base = load_model(config.model.path, config.model.dtype, processor)
    activity.set("preparing the model")
    family = probe_family(base, processor, progress.say)
    model, reports = prepare_learning(base, family.components, config.tune)
    if config.run.activation_checkpointing:
        checkpoint_activations(base)
    clock = DropoutClock(config.train.seed)
    install_dropout(model, family, config.tune, clock)
    return TrainableModel(base, model, family, reports, clock)
