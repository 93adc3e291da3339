"""The embedder that is trained, with its optimizer."""

import functools

import torch

from mmtrain.config import GIB, Config
from mmtrain.config.tune_section import Frozen
from mmtrain.contrastive.embedder import Embedder, Kind, Passes
from mmtrain.contrastive.load import set_trained
from mmtrain.contrastive.loss import LossSettings
from mmtrain.model.kernels.install import install
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.image_cache import caches_features
from mmtrain.train.contrastive.cuts import PairCuts
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
    if run.kernels == "auto":
        progress.say(install(model, runtime.device, progress.tick).line)
        if run.activation_checkpointing is not True:  # the rows are not known where activations are computed again
            embedder.leave_out_rows()
    if caches_features(config, runtime.num_processes):
        embedder.cache_images(config, runtime, progress)
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
            *_passes(config, embedder, caches),
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


def _passes(config: Config, embedder: Embedder, cached: frozenset[Kind]) -> tuple[Passes, Passes]:
    """Of the first epoch, and of those after it, when the embeddings of the kinds `cached` are known."""
    is_frozen = {name: isinstance(mode, Frozen) for name, mode in config.tune.modes.items()}
    text, image = (1.0 if is_frozen[name] and is_frozen["projector"] else 3.0 for name in ("language", "vision"))
    knows_images = embedder.caches_images or "image" in cached
    return Passes(text, image), Passes(0.0 if "text" in cached else text, 0.0 if knows_images else image)
