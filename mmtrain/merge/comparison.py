"""The logits of base + adapter, with which those of the merged model are compared."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mmtrain.dataset.batch import make_batch
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.merge.weights import dequantized
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.inputs import InputMaker
from mmtrain.model.named_model import NamedModel
from mmtrain.model.packing_trial import random_samples
from mmtrain.scoring.load import load_named


class Comparison:
    """Compares the logits of models at the supervised tokens of the same samples, one sample at a time."""

    def __init__(self, samples: Iterable[Encoded], processor: ChatProcessor) -> None:
        self._processor = processor
        self._batches = [make_batch([0], [sample], processor, packing=False) for sample in samples]
        self._expected: list[Tensor] = []

    def expect(self, model: Any) -> None:
        """`model` is the one with which others are compared."""
        self._expected = self._logits(model)

    def check(self, model: Any, limit: float) -> float:
        """The relative difference (L2) of the logits of `model`. Raises UserError if it exceeds `limit`."""
        return check_difference(torch.cat(self._logits(model)), torch.cat(self._expected), limit, "logits")

    @torch.no_grad()
    def _logits(self, model: Any) -> list[Tensor]:
        """(num_supervised, vocabulary) of each sample."""
        make_inputs = InputMaker(model, self._processor)
        return [
            model(**make_inputs(batch), logits_to_keep=batch.supervised).logits.flatten(0, -2).float()
            for batch in self._batches
        ]


def load_compared(
    source: NamedModel, processor: ChatProcessor, samples: Sequence[Encoded]
) -> tuple[Comparison, PeftModel]:
    """The model of `source`, and its logits on the samples, or on random ones where there are none.

    A base model that was quantized for training is dequantized after that: its weights, not the original ones, are
    those that the adapter was trained with.
    """
    assert source.adapter is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")  # `untie` solves it
        adapted = load_named(source, processor)
        comparison = Comparison(samples or random_samples(adapted, processor), processor)
        comparison.expect(adapted)
        if source.quantization is not None:
            base = load_named(replace(source, adapter=None), processor)
            adapted = load_adapter(dequantized(base), read_adapter(source.adapter))
    return comparison, adapted


def check_difference(found: Tensor, expected: Tensor, limit: float, what: str) -> float:
    """The relative difference (L2) of the merged model's `what`. Raises UserError if it exceeds `limit`."""
    relative = float((found - expected).norm() / expected.norm())
    if not relative <= limit:
        raise UserError(
            f"the merged model's {what} differ by {relative:.1e} from those of base + adapter, over the {limit:g} of "
            "rounding: nothing is saved; use the base model with the adapter instead"
        )
    return relative
