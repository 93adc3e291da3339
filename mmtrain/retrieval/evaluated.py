"""The embedder that is evaluated, and its base model."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmtrain.config import Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.execution import cache_images
from mmtrain.contrastive.load import load_embedder, with_path
from mmtrain.model.adapter import load_adapter, read_adapter, say_other_processor
from mmtrain.model.components import is_as_loaded
from mmtrain.model.named_model import NamedModel
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime


def loaded_embedder(config: Config, path: Path | None, runtime: Runtime, progress: Progress) -> Embedder:
    """The base model, an adapter on it, or the model that a run saved, each with the processor of the config."""
    named = NamedModel.of(config, path)
    if path is not None:
        say_other_processor(path, config.model, progress.say)
    adapter = None if named.adapter is None else read_adapter(named.adapter)
    embedder = load_embedder(config, runtime, progress, named.path)
    if adapter is not None:
        embedder.model = load_adapter(embedder.model, adapter)
    embedder.model.requires_grad_(False)
    if is_as_loaded(embedder.model, embedder.components, ("vision", "projector")):  # also where an adapter is disabled
        cache_images(embedder, with_path(config, named.path), runtime, progress)
    return embedder


def base_of(
    config: Config, embedder: Embedder, runtime: Runtime, progress: Progress
) -> tuple[Embedder, AbstractContextManager[Any]]:
    """The base model, and the context in which it is that."""
    if isinstance(embedder.model, PeftModel):
        return embedder, embedder.model.disable_adapter()
    return load_embedder(config, runtime, progress), nullcontext()
