"""The embedder that is trained, with its optimizer."""

from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.contrastive.load import set_trained
from mmtrain.contrastive.loss import LossSettings
from mmtrain.contrastive.towers import Towers
from mmtrain.model.components import apply_tune, without_adapter
from mmtrain.model.dropout import DropoutContext, install_dropout
from mmtrain.model.family import Family
from mmtrain.model.load import checkpoint_activations
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.contrastive.cuts import PairCuts
from mmtrain.train.contrastive.embedding_cache import EmbeddingCache
from mmtrain.train.contrastive.graphs import GraphMemory
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.lost_gradients import LostGradients
from mmtrain.train.optimizer import make_optimizer

GIB = 2**30


def make_contrastive_learner(
    config: Config, embedder: Towers, dataset: PairDataset, runtime: Runtime, progress: Progress
) -> ContrastiveLearner:
    """Add what is trainable to the embedder's model, whose initial weights follow from the seed alone."""
    torch.manual_seed(config.train.seed)
    base: Any = embedder.model
    for line in without_adapter(base, embedder.components, config.tune):
        progress.say(line)
    model, reports = apply_tune(base, embedder.components, config.tune)
    embedder.model = model
    set_trained(config, embedder)
    if config.run.activation_checkpointing:
        checkpoint_activations(base)
    dropout = DropoutContext(config.train.seed)
    install_dropout(model, Family(embedder.components, "own"), config.tune, dropout, runtime.device, progress.say)
    model.to(runtime.device)
    settings, run = config.objective, config.run
    frozen = frozenset(kind for kind in ("text", "image") if embedder.is_frozen(kind))
    caches = frozen if run.image_cache.memory_gib > 0 else frozenset[str]()
    alone = frozenset[str]() if runtime.device.type == "cuda" and run.microbatches == "auto" else caches
    return ContrastiveLearner(
        embedder=embedder,
        items=dataset.train.items,
        cuts=PairCuts(dataset, run, runtime.num_processes, runtime.index, alone=alone),
        loss=LossSettings(settings.loss, settings.symmetric in ("auto", True), settings.dims),
        temperature_max=settings.temperature_max,
        runtime=runtime,
        optimizer=make_optimizer(model, embedder.components, config),
        dropout=dropout,
        lost_gradients=LostGradients(model, embedder.components),
        component_reports=reports,
        graph_memory=GraphMemory(model, run.graph_memory_gib * GIB),
        cache=EmbeddingCache(caches, run.image_cache.memory_gib * GIB),
        exact=run.microbatches != "auto",
    )
