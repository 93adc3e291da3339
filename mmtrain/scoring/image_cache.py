"""Whether features of pictures are kept, and where: what says which features are the same."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import PIL
import transformers

from mmtrain import __version__
from mmtrain.config import Config
from mmtrain.config.schema import Frozen
from mmtrain.dataset.hashes import cache_folder, model_fingerprints
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.image_cache.features import PictureFeatures, find_fields
from mmtrain.model.image_cache.files import FeatureFolder
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.runtime.processes import Runtime

GIB = 2**30


def keeps_features(config: Config, num_processes: int) -> bool:
    """Whether a training keeps features, as far as the config says: the frozen parts' output is the same every time.

    Not where weights are spread: all processes must then run the same modules, and each lacks other pictures.
    """
    tune, run = config.tune, config.run
    frozen = isinstance(tune.vision, Frozen) and isinstance(tune.projector, Frozen)
    spread = run.weights == "shard" and num_processes > 1
    return frozen and not spread and max(run.image_cache.memory_gib, run.image_cache.disk_gib) > 0


def make_store(config: Config, runtime: Runtime, say: Callable[[str], None]) -> FeatureStore | None:
    """Where features are kept, None where there is no room for any."""
    limits = config.run.image_cache
    folder = None
    if limits.disk_gib:
        folder = FeatureFolder(cache_folder() / "features", _model_key(config, runtime), limits.disk_gib * GIB, say)
    return FeatureStore(limits.memory_gib * GIB, folder) if max(limits.memory_gib, limits.disk_gib) else None


def find_features(
    model: Any, processor: ChatProcessor, runtime: Runtime, store: FeatureStore | None, say: Callable[[str], None]
) -> PictureFeatures | None:
    """What puts cached features into `model`, which is on its device; None where there is no store, no image, or where
    the features cannot be cached: `say` is given the one line that says why."""
    if store is None or processor.images is None:
        return None
    with runtime.autocast():
        fields = find_fields(model, processor)
    if isinstance(fields, str):
        say(f"image cache: off, {fields}")
        return None
    return PictureFeatures(model, store, fields)


def _model_key(config: Config, runtime: Runtime) -> str:
    """A SHA-256 over all that decides the bits of a picture's features beside the picture."""
    files = runtime.from_first(
        "features", lambda: json.dumps(model_fingerprints(config.model.path, runtime.activity.tick))
    )
    versions = {"mmtrain": __version__, "transformers": transformers.__version__, "pillow": PIL.__version__}
    made_by = {"dtype": config.model.dtype, "threads": runtime.num_threads, **runtime.kernels, **versions}
    return hashlib.sha256(json.dumps([json.loads(files), made_by], sort_keys=True).encode()).hexdigest()
