"""Replies of a model to batches of prompts, by transformers' own `generate`."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mmtrain.dataset.batch import Batch, make_batch
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.errors import UserError
from mmtrain.generate.prompts import trained_end
from mmtrain.generate.sampling import Sampling
from mmtrain.model.components import base_model
from mmtrain.model.load import ANY_LENGTH
from mmtrain.model.rotary_trial import length_that_changes, rotary_calls
from mmtrain.model.transfer import on_device
from mmtrain.safe_text import error_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model replied."""

    text: str
    """Without the token that ends it, and without white space at its ends."""
    ids: tuple[int, ...]
    """Its tokens, the one that ends it included."""
    is_complete: bool
    """False where `max_new_tokens` cut it off."""
    log_probability: float | None
    """The mean over its tokens of the log-probability of the most likely token, in nats; None unless greedy."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """How a model generates whose weights are sharded over processes: all of them run as many forward passes."""

    inside: Callable[[Callable[[], Tensor]], Tensor]
    """Calls a function where the weights are complete."""
    all_have_ended: Callable[[bool], bool]
    """From whether the replies of this process have ended, whether those of all processes are to end. Called after each
    token, by all of them."""


class Generator:
    """Generates replies with one model, which is in eval mode and on its device.

    `encoder` is that of the prompts: replies stop at the token that it trains replies to end with, and at those that
    the model's directory names.
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        autocast: Callable[[], AbstractContextManager[None]],
        max_positions: int = ANY_LENGTH,
        on_token: Callable[[], bool] = lambda: False,
        sharded: Sharded | None = None,
        alone: Callable[[], bool] | None = None,
    ) -> None:
        """`max_positions`: the most tokens that a prompt and its reply may have together.
        `on_token` is called after each token of a batch; where it gives True, the replies of the batch end there.
        With `sharded` all processes must ask for as many batches, with one `max_new_tokens`, and greedily.
        `alone`: whether the model takes one prompt with images at a time; called before the first batch of several. By
        default only where their images cannot be laid out together. Prompts whose length changes the rotary
        frequencies of others (`rotary_trial`) go alone in any case."""
        self._model = base_model(model)
        self._autocast, self.max_positions, self._on_token, self._sharded = autocast, max_positions, on_token, sharded
        self._processor = encoder.processor
        self._alone = alone or (lambda: not encoder.processor.lays_out_together)
        end = trained_end(encoder)
        self.stop_ids: frozenset[int] = self._processor.tokenizer.traits.eos_ids | (set() if end is None else {end})
        taken = inspect.signature(self._model.forward).parameters.keys()
        self._type_keys = self._processor.type_keys & taken
        self._uses_cache = True
        self._num_together: int | None = None

    @torch.no_grad()
    def replies(self, prompts: Sequence[Encoded], sampling: Sampling, seed: int | None = None) -> list[Reply]:
        """The reply to each prompt, all of them in one batch, or one at a time where the model takes no more. A `seed`
        decides what is sampled.

        Raises SampleError where an image does not decode, UserError where a prompt leaves no room for its reply, or
        where the model cannot generate.
        """
        self._check_room(prompts, sampling.max_new_tokens)
        first = sampling.seed if seed is None else seed
        if self._must_divide(prompts, sampling):
            return [self.replies([own], sampling, first + n)[0] for n, own in enumerate(prompts)]
        batch = make_batch(range(len(prompts)), prompts, self._processor, packing=False)
        inputs = self._inputs(batch)
        stop_ids = self.stop_ids if self._sharded is None else ()
        config = sampling.config(stop_ids, self._processor.tokenizer.traits.pad_id)
        try:
            made, confidence = self._generated(inputs, sampling, config, first)
        except (AttributeError, TypeError, ValueError) as error:  # the cache of a family can raise anything
            if self._sharded is not None or not self._uses_cache:
                raise UserError(f"the model cannot generate: {error_line(error)}") from error
            _log.warning("generation: without a cache of earlier tokens, slower: %s", error_line(error))
            self._uses_cache = False
            return self.replies(prompts, sampling, seed)
        length = inputs["input_ids"].shape[1]
        new = [self._own(ids) for ids in made[:, length:].tolist()]
        found = confidence.means([len(ids) for ids in new])
        return [self.reply(ids, mean) for ids, mean in zip(new, found, strict=True)]

    def _generated(
        self, inputs: dict[str, Any], sampling: Sampling, config: GenerationConfig, seed: int
    ) -> tuple[Tensor, "_Confidence"]:
        """(rows, tokens) the prompts and their replies, and the confidence of greedy ones."""
        confidence = _Confidence()
        if sampling.do_sample:
            torch.manual_seed(seed)
        if not self._uses_cache:
            config.use_cache = False
        is_greedy = not sampling.do_sample and sampling.num_beams == 1
        watched = LogitsProcessorList([confidence] if is_greedy else [])
        length = inputs["input_ids"].shape[1]
        stopping = StoppingCriteriaList([_EndedBy(lambda ids: self._is_to_end(ids[:, length:]))])

        def generate() -> Tensor:
            found: Tensor = self._model.generate(
                **inputs, generation_config=config, logits_processor=watched, stopping_criteria=stopping
            )
            return found

        with self._autocast(), _own_settings(self._model):
            return generate() if self._sharded is None else self._sharded.inside(generate), confidence

    def _must_divide(self, prompts: Sequence[Encoded], sampling: Sampling) -> bool:
        """Whether these prompts go through the model one at a time. Not with sharded weights, where every process must
        run it as often: there the caller makes batches of one."""
        if self._sharded is not None or len(prompts) == 1:
            return False
        if self._num_together is None:
            self._num_together = self._find_num_together(prompts[0], sampling)
        longest = max(prompt.num_tokens for prompt in prompts) + sampling.max_new_tokens
        return longest > self._num_together or (any(prompt.images for prompt in prompts) and self._alone())

    def _find_num_together(self, prompt: Encoded, sampling: Sampling) -> int:
        """The most tokens of a prompt with its reply that leave the rotary frequencies of the others as they are."""
        with rotary_calls(self._model) as calls:
            self.replies([prompt], replace(sampling, max_new_tokens=1))
        length = length_that_changes(calls, self.max_positions)
        if length is None:
            return self.max_positions
        _log.warning("generation: prompts that can get more than %d tokens with their reply go alone", length - 1)
        return length - 1

    def _check_room(self, prompts: Sequence[Encoded], max_new_tokens: int) -> None:
        room = self.room_after(prompts)
        if max_new_tokens > room:
            raise UserError(
                f"--max-new-tokens {max_new_tokens}: a prompt has {self.max_positions - room} tokens and the "
                f"model {self.max_positions} positions: expected at most {room}"
            )

    def _is_to_end(self, new: Tensor) -> bool:
        """Whether the replies of a batch end here, whose tokens so far are `new`, (rows, tokens). A reply that has its
        end already is continued with the others."""
        stop = self._on_token()
        if self._sharded is None:
            return stop
        ends = torch.tensor(sorted(self.stop_ids), device=new.device)
        return self._sharded.all_have_ended(stop or bool(torch.isin(new, ends).any(1).all()))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of `generate`, padded on the left, on the model's device."""
        ids, mask = _padded_left(batch)
        image = self._processor.image_token_id
        no_types = image is None or self._processor.marks_replies
        types = torch.zeros_like(ids) if no_types else ((ids == image) & mask.bool()).long()
        inputs = {"input_ids": ids, "attention_mask": mask, **batch.image_inputs}
        inputs |= dict.fromkeys(self._type_keys, types)
        device = self._model.device
        return {key: on_device(value, device) if isinstance(value, Tensor) else value for key, value in inputs.items()}

    def room_after(self, prompts: Sequence[Encoded]) -> int:
        """Tokens that every reply to these prompts may have."""
        return self.max_positions - max(prompt.num_tokens for prompt in prompts)

    def reply(self, ids: Sequence[int], log_probability: float | None) -> Reply:
        """The reply that has these tokens, the one that ends it included."""
        is_complete = bool(ids) and ids[-1] in self.stop_ids
        text = self._processor.tokenizer.decode(list(ids[:-1] if is_complete else ids)).strip()
        return Reply(text, tuple(ids), is_complete, log_probability)

    def _own(self, ids: list[int]) -> list[int]:
        """Without the padding after the end."""
        end = next((at for at, id_ in enumerate(ids) if id_ in self.stop_ids), None)
        return ids if end is None else ids[: end + 1]


class _Confidence(LogitsProcessor):  # type: ignore[misc]
    """Notes the log-probability of the most likely token at each step, and changes nothing."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def means(self, lengths: Sequence[int]) -> list[float | None]:
        """For each row the mean over its first steps, as many as `lengths` says; None where nothing was noted: it was
        not asked for, or a model's own `generate` passes no logits on."""
        if not self._steps:
            return [None] * len(lengths)
        found: list[list[float]] = torch.stack(self._steps, dim=1).tolist()
        return [sum(own[:length]) / max(1, length) for own, length in zip(found, lengths, strict=True)]


class _EndedBy(StoppingCriteria):  # type: ignore[misc]
    """Ends all rows where `is_to_end` says so of their tokens, (rows, tokens)."""

    def __init__(self, is_to_end: Callable[[Tensor], bool]) -> None:
        self._is_to_end = is_to_end

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._is_to_end(input_ids), device=input_ids.device)


def _padded_left(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, length) ids, and 1 where there is a token of a prompt, with the padding of `batch` moved to the left."""
    ids, mask = batch.input_ids.clone(), torch.zeros_like(batch.input_ids)
    for segment in batch.segments:
        padding = ids.shape[1] - segment.length
        ids[segment.row] = ids[segment.row].roll(padding)
        mask[segment.row, padding:] = 1
    return ids, mask


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Put an empty generation config in the place of the model's, whose values `generate` takes for all that are not
    set: a repetition penalty, tokens to suppress, another end token."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def batched(num_prompts: int, batch_size: int) -> Iterator[range]:
    """The positions of the prompts of each batch, in order."""
    return (range(start, min(start + batch_size, num_prompts)) for start in range(0, num_prompts, batch_size))
