"""Whether several samples can go through the model at once, and share a row: tried on the loaded model.

The model computes rows of random samples as in training, and each sample alone with an attention mask, as in inference.
The logits must agree up to rounding, which grows with the model: padded rows show its size. And if one sample of a
packed row is replaced, the logits of the other must not change. Samples can affect each other for many reasons that no
config names: another kind of attention, a mask made without the positions, recurrent layers, or bidirectional attention
to images.
"""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mmtrain.dataset.batch import make_batch
from mmtrain.encoding.encode import Encoded, ImageSpan
from mmtrain.encoding.image_runner import TYPE_KEYS
from mmtrain.encoding.images import FoundImage
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.planned_device import kind_of
from mmtrain.model.quantized_weights import is_quantized, num_weights
from mmtrain.model.rotary_trial import length_that_changes, rotary_calls
from mmtrain.safe_text import error_line

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest relative difference (L2) of the logits of a section of a sample that counts as rounding.

Measured with random weights, 2 to 28 layers, dense and mixture of experts. Rounding: 7e-7 in float32; in bfloat16 it
grows with the model, from 0.012 (0.03 for a single token) to 0.033 with a width of 1,792 and 28 layers. Leaks, the same
in both: 0.6 to 1.5 if a sample attends to the one before it, 0.7 to 1.2 if it attends to one token of it, 0.3 to 1.4
through recurrent layers, 0.2 to 1 through a convolution over three tokens. Images of 8 tokens with bidirectional
attention only in packed or only in padded rows: 0.13 to 0.2 in the image, 0.03 after it.
"""
_ROUNDING = 4.0
"""Packed rows may differ by this many times the difference of padded rows, if that exceeds the tolerance. Measured:
1.7 to 1.9 times, in bfloat16 with widths of 896 and 1,792."""
_REFUSED = 4
"""A sample alone may differ from the model's own logits by this many tolerances: a model refused because of rounding
could not be trained at all."""
_ALONE = 2
"""If padded rows differ by more than this many tolerances, samples go through the model one at a time."""
_NUM_TOKENS = (60, 24)
"""Text tokens of the two samples."""
_NUM_REPLACED = 6
"""Text tokens at the end of a sample that are replaced, to try whether what is before them changes."""
_NUM_BEFORE = 5
"""Text tokens before the image. Each section is compared separately, so a leak over only a few tokens is noticed."""
_NUM_COMPARED = 32
"""Tokens of a section whose logits are compared: all of them would take gigabytes in a long sample."""
_SIZES = ((112, 112), (84, 168))
"""(width, height) of the images, one in each sample: a square, which some families give no mask, and another."""
_CPU_MULTIPLICATIONS, _GPU_MULTIPLICATIONS = 1e11, 1e14
"""Limit for the cost of the longer sample, weights times tokens: it takes seconds."""


@dataclass(frozen=True, slots=True)
class RowsFound:
    """How samples can go through a model."""

    fault: str | None = None
    """Why they cannot share a row; None where they can, or where that was not tried."""
    alone: bool = False
    """One at a time: several affect each other even in padded rows."""


def try_rows(
    model: Any, processor: ChatProcessor, dtype: torch.dtype, packing: bool = True, longest: int = 0
) -> RowsFound:
    """How samples can go through `model`, the longest of which has `longest` tokens. With `packing` False only padded
    rows are tried.

    `model` is in eval mode, on the device that runs it; `dtype` is that of its matrix products. Neither the model nor
    the random state changes. Raises UserError if a sample alone fails, or if its logits are not those of the model
    without mmtrain's positions.
    """
    try:
        trial = _Trial(model, processor, dtype)
        with rotary_calls(model) as calls:
            first, second = trial.logits([0], packing=False), trial.logits([1], packing=False)
        other = max(_difference(first, trial.plain_logits(0)), _difference(second, trial.plain_logits(1)))
    except Exception as error:  # a family that is not supported can raise anything
        given = [f"model.image_processor.{key}" for key in processor.image_settings]
        given += ["model.quantization"] if any(map(is_quantized, model.modules())) else []
        hint = f"; {', '.join(given)} may not fit the model" if given else ""
        raise UserError(f"the model cannot be run on a trial batch: {error_line(error)}{hint}") from error
    if not all(torch.isfinite(logits).all() for logits in first + second):
        raise UserError("the logits of the model are not finite on a trial batch: its weights or its dtype are wrong")
    if other > _REFUSED * trial.tolerance:
        raise UserError(
            f"the positions or token types that mmtrain gives this model change its logits by {other:.0%} from those "
            "that it computes on its own: this family is not supported"
        )
    if trial.looks_ahead(second) > trial.tolerance:
        raise UserError(
            "this is not a causal language model: its logits at a token change with the tokens after it; expected a "
            "model that generates text token by token"
        )
    length = length_that_changes(calls, longest)
    if length is not None:
        reason = f"a sample of more than {length - 1:,} tokens changes the rotary frequencies of the others"
        way_out = f"with data.max_length={length - 1} they are computed together"
        return RowsFound(f"this model takes one sample at a time: {reason}; {way_out}", alone=True)
    if not processor.lays_out_together:
        return RowsFound("the images of this model are laid out for one sample at a time", alone=True)
    try:
        padded = _difference(trial.logits([0, 1], packing=False), first + second)
    except Exception as error:
        return RowsFound(f"this model takes one sample at a time: padded rows raise {error_line(error)}", alone=True)
    if padded > _ALONE * trial.tolerance:
        found = f"in padded rows its logits differ by {padded:.0%} from those of each sample alone"
        return RowsFound(f"this model takes one sample at a time: {found}", alone=True)
    return RowsFound(_packing_fault(trial, first, second, padded) if packing else None)


def _packing_fault(trial: "_Trial", first: list[Tensor], second: list[Tensor], padded: float) -> str | None:
    """Why the two samples cannot share a row. `first`, `second`: their logits alone, from which those in padded rows
    differ by `padded`."""
    if trial.too_far:
        return f"this model attends within {trial.too_far:,} tokens, which is too long to try"
    try:
        forward, backward = trial.logits([0, 1], packing=True), trial.logits([1, 0], packing=True)
        packed = max(_difference(forward, first + second), _difference(backward, second + first))
        leaked = trial.leaked(forward)
    except Exception as error:
        return f"this model cannot run packed rows: {error_line(error)}"
    if packed > max(trial.tolerance, _ROUNDING * padded):
        return f"in a packed row the logits of this model differ by {packed:.0%} from those of each sample alone"
    if leaked > trial.tolerance:
        return f"in a packed row the logits of this model change by {leaked:.0%} with the other sample"
    return None


class _Trial:
    """A model, two random samples of it, two more of the same lengths, and the second with other tokens at its end."""

    def __init__(self, model: Any, processor: ChatProcessor, dtype: torch.dtype) -> None:
        self._model, self._processor, self._dtype = model, processor, dtype
        self._make_inputs = InputMaker(model, processor)
        self.tolerance = _TOLERANCE[dtype]
        reach, longest = _reach(model), _longest(model)
        self.too_far = reach if reach > longest and not self._make_inputs.attends_by_sample else None
        """The window of an attention that is not mmtrain's, if it is too long to try."""
        first, second = _NUM_TOKENS
        first += reach if reach <= longest else 0
        self._samples = [
            sample for seed in (0, 1) for sample in random_samples(model, processor, (first, second), seed)
        ]
        own, other = self._samples[1], self._samples[3]
        self._samples.append(replace(own, ids=np.append(own.ids[:-_NUM_REPLACED], other.ids[-_NUM_REPLACED:])))

    def logits(self, order: Sequence[int], packing: bool) -> list[Tensor]:
        """(num_compared, vocabulary) float32 for each section of the samples, in this order."""
        return self._run(order, packing, ())

    def plain_logits(self, number: int) -> list[Tensor]:
        """Those of one sample, given to the model as inference does: it makes positions itself, and the types of a text
        as well."""
        left_out = () if self._samples[number].images else TYPE_KEYS
        return self._run([number], False, ("position_ids", *left_out))

    def _run(self, order: Sequence[int], packing: bool, left_out: Sequence[str]) -> list[Tensor]:
        samples = [self._samples[number] for number in order]
        batch = make_batch(order, samples, self._processor, packing, row_multiple=ROW_MULTIPLE)
        device, compared = self._model.device, batch.supervised
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16),
        ):
            inputs = {key: value for key, value in self._make_inputs(batch).items() if key not in left_out}
            keep = compared[0].nonzero()[:, 0] if packing else compared
            logits = self._model(**inputs, logits_to_keep=keep.to(device)).logits
        sizes = [int(sample.supervised[section].sum()) for sample in samples for section in _sections(sample)]
        return list(torch.split(logits.flatten(0, -2).float(), sizes))

    def looks_ahead(self, second: list[Tensor]) -> float:
        """The change of `second`, the logits of the second sample, before its last tokens if these are replaced. As in
        `leaked` there is no rounding but with experts."""
        replaced = int(self._samples[1].supervised[-_NUM_REPLACED:].sum())
        changed = self.logits([4], packing=False)
        return _difference(*([*found[:-1], found[-1][:-replaced]] for found in (changed, second)))

    def leaked(self, row: list[Tensor]) -> float:
        """The change of the logits of each sample of the packed `row` if the other sample is replaced.

        The same kernels run on the same shapes, so there is no rounding: the change is 0, except with experts, whose
        products depend on the number of tokens that each gets.
        """
        middle = len(row) // 2
        after, before = self.logits([2, 1], packing=True), self.logits([0, 3], packing=True)
        return max(_difference(after[middle:], row[middle:]), _difference(before[:middle], row[:middle]))


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference (L2) over the sections. Each token's mean is subtracted, because softmax ignores
    it. Infinite if a value is not finite."""
    pairs = (tuple(x - x.mean(-1, keepdim=True) for x in pair) for pair in zip(found, expected, strict=True))
    values = [float((own - other).norm() / other.norm()) for own, other in pairs if not torch.equal(own, other)]
    return max((value if np.isfinite(value) else float("inf") for value in values), default=0.0)


def _reach(model: Any) -> int:
    """The longest window, chunk or choice of tokens that the config names and a sample can exceed."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or float("inf")
    named = (value for key, value in config.to_dict().items() if re.search("window|chunk|topk", key))
    return max((value for value in named if type(value) is int and value < limit), default=0)


def _longest(model: Any) -> int:
    """The longest window that is tried."""
    limit = _CPU_MULTIPLICATIONS if kind_of(model.device) == "cpu" else _GPU_MULTIPLICATIONS
    return max(_NUM_TOKENS[0] // 2, int(limit / sum(map(num_weights, model.parameters()))))


def random_samples(
    model: Any, processor: ChatProcessor, num_tokens: Sequence[int] = _NUM_TOKENS, seed: int = 0
) -> Iterator[Encoded]:
    """Random samples with these numbers of text tokens, each with an image of noise if the model takes images.

    `supervised` marks the tokens that are compared, here also in an image.
    """
    noise = np.random.default_rng(seed)
    size = min(len(processor.tokenizer.wrapped), model.get_input_embeddings().num_embeddings)
    ordinary = [n for n in range(size) if not processor.tokenizer.is_special(n) and n != processor.image_token_id]
    for count, image_size in zip(num_tokens, _SIZES, strict=True):
        text, image = noise.choice(ordinary, count), np.zeros(0, np.int64)
        spans: tuple[ImageSpan, ...] = ()
        if processor.images is not None:
            (tokens,) = processor.image_tokens([image_size])
            image = np.array(tokens.ids)
            spans = (ImageSpan(_noise_image(noise, image_size), _NUM_BEFORE, len(image), tokens.num_placeholders),)
        ids = np.concatenate([text[:_NUM_BEFORE], image, text[_NUM_BEFORE:]]).astype(np.int32)
        sample = Encoded(ids, np.zeros(len(ids), np.bool_), spans)
        sections = _sections(sample)
        # where a prompt has another type of tokens than its reply, the first that is supervised begins the reply
        middle = (sections[-1].start + sections[-1].stop) // 2
        for section in [slice(middle, len(ids))] if processor.marks_replies else sections:
            positions = np.arange(len(ids))[section]
            evenly = np.linspace(0, len(positions) - 1, min(_NUM_COMPARED, len(positions))).astype(int)
            sample.supervised[positions[evenly]] = True
        yield sample


def _sections(sample: Encoded) -> list[slice]:
    """The text before the image, the image if there is one, and the text after it."""
    ends = [_NUM_BEFORE, *(span.start + span.length for span in sample.images), sample.num_tokens]
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def _noise_image(noise: np.random.Generator, size: tuple[int, int]) -> FoundImage:
    width, height = size
    file = io.BytesIO()
    PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return FoundImage("noise", file.getvalue(), size)
