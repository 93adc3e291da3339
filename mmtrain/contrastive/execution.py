"""How an embedder is computed: with kernels, and with cached outputs of a frozen vision tower."""

from mmtrain.config import Config
from mmtrain.contrastive.chat_embedder import ChatEmbedder
from mmtrain.contrastive.embedder import Embedder
from mmtrain.model.kernels.install import install
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.image_cache import caches_features, input_maker, make_store


def choose_execution(embedder: Embedder, config: Config, runtime: Runtime, progress: Progress) -> None:
    """Kernels and the image cache for `embedder`, whose model has its trainable parameters and is on its device, each
    where a trial passes; `progress` says what was decided."""
    if config.run.kernels == "auto":
        progress.say(install(embedder.model, runtime.device, progress.tick).line)
        # the rows are not known where activations are computed again
        if config.run.activation_checkpointing is not True:
            embedder.leave_out_rows()
    if caches_features(config, runtime.num_processes):
        cache_images(embedder, config, runtime, progress)


def cache_images(embedder: Embedder, config: Config, runtime: Runtime, progress: Progress) -> None:
    """Have each image go once through the vision tower and projector of `embedder`, which are frozen, as in chat runs;
    `progress` says why the model cannot. Nothing for a dual encoder, whose embeddings are cached as a whole."""
    if isinstance(embedder, ChatEmbedder):
        store, vision = make_store(config, runtime, progress), embedder.vision
        model, processor = embedder.model, embedder.processor
        embedder.make_inputs = input_maker(model, processor, config, runtime, store, vision, progress.say)
