"""Whether a run packs the samples of a micro-batch into one row: what the config says, and what the model can."""

from collections.abc import Callable
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.packing_trial import packing_fault
from mmtrain.runtime.processes import Runtime


def choose_packing(
    model: Any, processor: ChatProcessor, config: Config, runtime: Runtime, say: Callable[[str], None]
) -> bool:
    """Try `model`, as it is computed and before its weights are sharded, in the first process, and decide for all.

    `say` is given the line that says why `auto` does not pack. Raises UserError where `run.packing` is true and the
    samples of a row affect each other, and where not even padded rows can be trained.
    """
    wanted, dtype = config.run.packing, getattr(torch, config.model.dtype)

    def fault() -> str:
        return packing_fault(model, processor, dtype, packing=wanted is not False) or ""

    found = runtime.from_first("packing", fault)
    if not found:
        return wanted is not False
    if wanted is True:
        raise UserError(f"run.packing: {found}; expected false or auto for this model")
    say(f"packing: off, {found}")
    return False
