"""Whether the features of images are cached, where, and which of them are the same."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import PIL
import transformers

from mmtrain import __version__
from mmtrain.config import GIB, Config
from mmtrain.config.tune_section import Frozen
from mmtrain.dataset.hashes import model_fingerprints
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.image_cache.features import ImageFeatures, find_fields
from mmtrain.model.image_cache.files import FeatureFolder
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.model.inputs import InputMaker
from mmtrain.model.planned_device import kind_of
from mmtrain.model.vision import VisionInputs
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.user_cache import cache_folder


def caches_features(config: Config, num_processes: int) -> bool:
    """Whether training caches features, as far as the config says: frozen components give the same every time.

    Not where weights are sharded: all processes must then run the same modules, and each lacks other images.
    """
    tune, run = config.tune, config.run
    frozen = isinstance(tune.vision, Frozen) and isinstance(tune.projector, Frozen)
    if tune.components.language:  # they may be modules that make features
        frozen = frozen and isinstance(tune.language, Frozen)
    return (
        frozen and not run.is_sharded(num_processes) and max(run.image_cache.memory_gib, run.image_cache.disk_gib) > 0
    )


def make_store(config: Config, runtime: Runtime, progress: Progress) -> FeatureStore | None:
    """Where features are stored, None where the config leaves no room for any."""
    limits = config.run.image_cache
    if not max(limits.memory_gib, limits.disk_gib):
        return None
    folder = None
    if limits.disk_gib:
        key = _model_key(config, runtime, progress)
        folder = FeatureFolder(cache_folder() / "features", key, limits.disk_gib * GIB, progress.say)
    return FeatureStore(limits.memory_gib * GIB, folder)


def input_maker(
    model: Any,
    processor: ChatProcessor,
    config: Config,
    runtime: Runtime,
    store: FeatureStore | None,
    vision: VisionInputs,
    say: Callable[[str], None],
) -> InputMaker:
    """What makes the inputs of `model`, which is on its device: with cached features where there is a store and a trial
    shows that the model can take them; `say` is given the line that says why it cannot."""
    if store is None or processor.images is None:
        return InputMaker(model, processor, None, vision)
    with runtime.autocast():
        fields = find_fields(model, processor)
    if isinstance(fields, str):
        say(f"image cache: off, {fields}")
        return InputMaker(model, processor, None, vision)
    together = _encodes_together(config, runtime)
    if together and not fields.can_be_split:
        say("image cache: images that are not in it are encoded one by one, because their tensors cannot be joined")
    return InputMaker(model, processor, ImageFeatures(model, store, fields, vision, together), vision)


def _encodes_together(config: Config, runtime: Runtime) -> bool:
    """Whether images that are missing from the cache are encoded at once. Not on the CPU, where that gains nothing, nor
    where bits are promised: those of an image would depend on which others were missing."""
    return kind_of(runtime.device) == "cuda" and config.run.microbatches == "auto"


def _model_key(config: Config, runtime: Runtime, progress: Progress) -> str:
    """A SHA-256 over all that decides the bits of an image's features besides the image."""
    files = runtime.from_first("features", lambda: model_fingerprints(config.model.path, progress.tick))
    settings = {"image_processor": config.model.image_processor}
    versions = {"mmtrain": __version__, "transformers": transformers.__version__, "pillow": PIL.__version__}
    made_by = {"dtype": config.model.dtype, "threads": runtime.num_threads, **runtime.kernels, **versions, **settings}
    if _encodes_together(config, runtime):
        made_by["images"] = "together"
    return hashlib.sha256(json.dumps([files, made_by], sort_keys=True).encode()).hexdigest()
