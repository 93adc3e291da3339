"""What is trainable of an embedder."""

from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.load import set_trained
from mmtrain.model.adapter import say_other_processor
from mmtrain.model.dropout import DropoutContext, install_dropout
from mmtrain.model.earlier_run import start_from_run
from mmtrain.model.load import checkpoint_activations
from mmtrain.model.lora_targets import without_adapter
from mmtrain.model.tune import ComponentReport, apply_tune, kept_frozen
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime


def make_trainable(
    config: Config, embedder: Embedder, runtime: Runtime, progress: Progress
) -> tuple[DropoutContext, list[ComponentReport]]:
    """Add what is trainable to the embedder's model, whose initial weights follow from the seed alone."""
    torch.manual_seed(config.train.seed)
    base: Any = embedder.model
    for find_lines in (without_adapter, kept_frozen):
        for line in find_lines(base, embedder.components, config.tune):
            progress.say(line)
    embedder.model, reports = apply_tune(base, embedder.components, config.tune)
    set_trained(config, embedder)
    if config.model.adapter is not None:
        tick = runtime.activity.tick
        say_other_processor(Path(config.model.adapter), config.model, progress.say)
        progress.say(start_from_run(embedder.model, embedder.components, config.model, tick))
        embedder.scale.limit(config.objective.temperature_max)
    if config.run.activation_checkpointing is True:
        checkpoint_activations(base)
    dropout = DropoutContext(config.train.seed)
    install_dropout(embedder.model, embedder.family, config.tune, dropout, runtime.device, progress.say)
    embedder.model.to(runtime.device)
    return dropout, reports
