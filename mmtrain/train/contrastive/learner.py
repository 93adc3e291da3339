"""The embedder that is trained, with its optimizer."""

import functools

import torch

from mmtrain.config import GIB, Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.execution import choose_execution
from mmtrain.contrastive.load import set_trained
from mmtrain.contrastive.loss import LossSettings
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.contrastive.cuts import PairCuts, passes_of
from mmtrain.train.contrastive.embedding_cache import EmbeddingCache
from mmtrain.train.contrastive.graphs import GraphMemory
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.lost_gradients import LostGradients
from mmtrain.train.optimizer import make_optimizer
from mmtrain.train.trainable import add_trainable


def make_contrastive_learner(
    config: Config, embedder: Embedder, dataset: PairDataset, runtime: Runtime, progress: Progress
) -> ContrastiveLearner:
    """The embedder's model with its trainable parameters, whose initial weights follow from the seed alone, and how its
    steps are computed."""
    settings, run = config.objective, config.run
    torch.manual_seed(config.train.seed)
    numbers = functools.partial(set_trained, config, embedder)
    model, reports, dropout = add_trainable(config, embedder.model, embedder.family, runtime, progress, numbers)
    embedder.model = model.to(runtime.device)
    embedder.scale.limit(settings.temperature_max)
    choose_execution(embedder, config, runtime, progress)
    symmetric = embedder.symmetric if settings.symmetric == "auto" else settings.symmetric
    frozen = frozenset(kind for kind in embedder.kinds if embedder.is_frozen(kind))
    caches = frozen if run.image_cache.memory_gib > 0 else frozenset[str]()
    alone = frozenset[str]() if runtime.device.type == "cuda" and run.microbatches == "auto" else caches
    if embedder.alone:
        alone = frozenset(embedder.kinds)
    return ContrastiveLearner(
        embedder=embedder,
        samples=dataset.train,
        cuts=PairCuts(
            dataset,
            run,
            runtime.num_processes,
            runtime.index,
            embedder.packing,
            alone,
            *passes_of(config, embedder, caches),
        ),
        loss=LossSettings(settings.loss, symmetric, settings.dims),
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
