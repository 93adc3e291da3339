"""How sure a model is of each learned token, by the cross-entropy that training uses."""

import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from mmtrain.config import Config
from mmtrain.dataset.batch import Loader, Samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.head import find_head_kind
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.load import load_model
from mmtrain.model.loss import supervised_nll
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.packing import choose_packing


@torch.no_grad()
def token_losses(
    config: Config, adapter: Path | None, samples: Samples, processor: ChatProcessor, indices: Iterable[int]
) -> dict[int, dict[int, float]]:
    """Negative log-likelihood in nats: sample number → position of the learned token → value.

    Raises UserError where the adapter cannot be loaded.
    """
    found_adapter = None if adapter is None else read_adapter(adapter)
    runtime = Runtime(config.model.dtype)
    say = functools.partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    model = load_model(config.model.path, config.model.dtype, processor)
    head_kind = find_head_kind(model, say)
    if found_adapter is not None:
        model = load_adapter(model, found_adapter)
    model.to(runtime.device)
    packing = choose_packing(model, processor, config, runtime, say)
    make_inputs = InputMaker(model, processor)
    found = {}
    loader = Loader(samples, processor, packing, row_multiple=ROW_MULTIPLE)
    for batch in loader.batches([index] for index in indices):
        with runtime.autocast():
            nll, _ = supervised_nll(model, head_kind, make_inputs(batch), batch)
        positions = batch.supervised[0].nonzero()[:, 0].tolist()
        found[batch.segments[0].sample] = dict(zip(positions, nll.tolist(), strict=True))
    return found
