"""A model's loss on each supervised token, by the same cross-entropy as in training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmtrain.config import Config
from mmtrain.dataset.batch import Samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.adapter import read_adapter
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.adapters import AdaptedModels


@torch.no_grad()
def token_losses(
    config: Config, adapter: Path | None, samples: Samples, processor: ChatProcessor, indices: Sequence[int]
) -> dict[int, dict[int, float]]:
    """Negative log-likelihood in nats: sample index → position of the supervised token → value.

    Raises UserError if the adapter cannot be loaded.
    """
    name = None if adapter is None else str(adapter)
    adapters = {} if name is None else {name: read_adapter(name)}
    runtime = Runtime(config.model.dtype, device=config.run.device)
    progress = Progress(runtime.activity.tick)
    models = AdaptedModels(config, processor, runtime, progress, adapters, cache_images=False)
    found = {}
    with models.adapted(name) as model, progress.task("computing losses", len(indices)) as task:
        for batch in model.batches(samples, [[index] for index in indices]):
            nll, _ = model.nll(batch)
            positions = batch.supervised[0].nonzero()[:, 0].tolist()
            found[batch.segments[0].sample] = dict(zip(positions, nll.tolist(), strict=True))
            task.advance()
    return found
