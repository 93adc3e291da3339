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
from mmtrain.model.load import checkpoint_activations, load_model
from mmtrain.model.lora_targets import without_adapter
from mmtrain.model.tune import ComponentReport, apply_tune, kept_frozen
from mmtrain.model.vision import VisionInputs, prepare_vision
from mmtrain.progress import Progress
from mmtrain.runtime.device import loading_faults
from mmtrain.runtime.processes import Runtime
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
    `load` gives a base model that has no values, on the device; None: that of the config is loaded."""
    torch.manual_seed(config.train.seed)
    settings, named = config.model, config.tune.components
    home = torch.device("cpu") if is_sharded(config, runtime) else runtime.device
    tick, quantization = runtime.activity.tick, settings.quantization
    with loading_faults():
        if load is not None:
            base = load()
        else:
            base = load_model(settings.path, settings.dtype, processor, home, tick, quantization, named)
    runtime.activity.set("preparing the model")
    family = probe_family(base, processor, progress.say, named)
    model, reports, dropout = add_trainable(config, base, family, runtime, progress, has_values=load is None)
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
    has_values: bool = True,
) -> tuple[Any, list[ComponentReport], DropoutContext]:
    """Freeze `base` and add what is trainable, with the values of `model.adapter` if there is one: the model, a row for
    each component, and what dropout depends on. `before_values` is called before these values are read, which needs a
    model that `has_values`."""
    settings = config.model
    for find_lines in (without_adapter, kept_frozen):
        for line in find_lines(base, family.components, config.tune):
            progress.say(line)
    model, reports = apply_tune(base, family.components, config.tune)
    before_values()
    if settings.adapter is not None and has_values:
        say_other_processor(Path(settings.adapter), settings, progress.say)
        progress.say(start_from_run(model, family.components, settings, runtime.activity.tick))
    if config.run.activation_checkpointing is True:
        checkpoint_activations(base)
    dropout = DropoutContext(config.train.seed)
    install_dropout(model, family, config.tune, dropout, runtime.device, progress.say)
    return model, reports, dropout


def is_sharded(config: Config, runtime: Runtime) -> bool:
    """Whether each of several processes stores a share of the weights."""
    return config.run.weights == "shard" and runtime.num_processes > 1
