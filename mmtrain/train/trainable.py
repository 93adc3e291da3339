"""The base model of a config with its trainable parameters, on the device, or on the CPU where it is to be sharded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.adapter import say_other_processor
from mmtrain.model.dropout import DropoutContext, install_dropout
from mmtrain.model.earlier_run import start_from_run
from mmtrain.model.family import Family, probe_family
from mmtrain.model.load import checkpoint_activations
from mmtrain.model.lora_targets import without_adapter
from mmtrain.model.tune import ComponentReport, apply_tune, kept_frozen
from mmtrain.model.vision import VisionInputs, prepare_vision
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.load import load_base
from mmtrain.train.lost_gradients import LostGradients


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model of which only what `tune` names is trainable."""

    base: Any
    """The model of transformers."""
    model: Any
    """The same, or a PeftModel around it."""
    family: Family
    component_reports: list[ComponentReport]
    """A row for each component."""
    dropout: DropoutContext
    lost_gradients: LostGradients
    vision: VisionInputs


def make_trainable(
    config: Config,
    processor: ChatProcessor,
    runtime: Runtime,
    progress: Progress,
    load: Callable[[], Any] | None = None,
) -> TrainableModel:
    """Load the base model, freeze it, and add what is trainable, whose initial weights follow from the seed alone.
    `load` gives the base model, on the device; None: that of the config is loaded."""
    torch.manual_seed(config.train.seed)
    home = torch.device("cpu") if config.run.is_sharded(runtime.num_processes) else runtime.device
    base = load() if load else load_base(config, processor, runtime, home)
    runtime.activity.set("preparing the model")
    family = probe_family(base, processor, progress.say, config.tune.components)
    model, reports, dropout = add_trainable(config, base, family, runtime, progress)
    model.to(home)
    with runtime.autocast():
        vision = prepare_vision(base, processor, runtime.device, progress.say)
    lost_gradients = LostGradients(model, family.components)
    return TrainableModel(base, model, family, reports, dropout, lost_gradients, vision)


def add_trainable(
    config: Config,
    base: Any,
    family: Family,
    runtime: Runtime,
    progress: Progress,
    before_values: Callable[[], None] = lambda: None,
) -> tuple[Any, list[ComponentReport], DropoutContext]:
    """Freeze `base` and add what is trainable, with the values of `model.adapter` if there is one: the model, a row for
    each component, and what dropout depends on. `before_values` is called before these values are read."""
    settings = config.model
    for find_lines in (without_adapter, kept_frozen):
        for line in find_lines(base, family.components, config.tune):
            progress.say(line)
    model, reports = apply_tune(base, family.components, config.tune)
    before_values()
    if settings.adapter is not None:
        say_other_processor(Path(settings.adapter), settings, progress.say)
        progress.say(start_from_run(model, family.components, settings, runtime.activity.tick))
    if config.run.activation_checkpointing is True:
        checkpoint_activations(base)
    dropout = DropoutContext(config.train.seed)
    install_dropout(model, family, config.tune, dropout, runtime.device, progress.say)
    return model, reports, dropout
