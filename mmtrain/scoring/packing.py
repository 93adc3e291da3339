"""How samples share micro-batches and rows: what the config says, and what the model can."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.load import length_limit
from mmtrain.model.packing_trial import RowsFound, try_rows
from mmtrain.runtime.processes import Runtime


@dataclass(frozen=True, slots=True)
class RowChoice:
    """How samples go through a model."""

    packing: bool
    """The samples of a micro-batch share one row."""
    alone: bool
    """A micro-batch has one sample."""

    def check_sharded(self, processor: ChatProcessor) -> None:
        """Raises UserError where the model cannot be trained so with sharded weights."""
        if self.alone and processor.images is not None:
            raise UserError(
                "run.weights: shard needs an image in every micro-batch, and this model takes one sample at a time: "
                "expected replicate"
            )


def choose_rows(
    model: Any, processor: ChatProcessor, config: Config, runtime: Runtime, say: Callable[[str], None]
) -> RowChoice:
    """Try `model`, as it is computed and before its weights are sharded, in the first process, and decide for all.

    `say` is given the line that says why `auto` does not pack, or why samples go through the model one at a time.
    Raises UserError where `run.packing` is true and the samples of a row affect each other.
    """
    wanted, dtype = config.run.packing, getattr(torch, config.model.dtype)
    longest = length_limit(config.model.path, config.data.max_length).num_tokens

    def tried() -> tuple[Any, ...]:
        return astuple(try_rows(model, processor, dtype, wanted is not False, longest))

    found = RowsFound(*runtime.from_first("packing", tried))
    if found.fault is None:
        return RowChoice(wanted is not False, alone=False)
    if wanted is True:
        raise UserError(f"run.packing: {found.fault}; expected false or auto for this model")
    say(f"packing: off, {found.fault}")
    return RowChoice(packing=False, alone=found.alone)
