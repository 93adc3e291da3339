"""Whether the rotary frequencies of a model depend on the longest sample of a batch, tried on its own modules.

One kind of scaling (LongRoPE: Ding et al. 2024, arXiv 2402.13753) has two sets of frequencies, and transformers uses
the second for all tokens of a batch if one of them is past the length of pretraining. Then the loss of a short sample
would change with the samples next to it.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.components import decoder_of

_FREQUENCIES = "inv_freq"
"""What the classes of transformers call the frequencies, sometimes after the kind of attention."""
_NUM_TOKENS = 3
"""Given to a module: few, so that the length of the samples in a trial does not matter. At position 0 all frequencies
give the same."""
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@contextmanager
def rotary_calls(model: Any) -> Iterator[list[Call]]:
    """The calls of the language model's modules with rotary frequencies, as they are made."""
    calls: list[Call] = []

    def saw(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((module, args, kwargs))

    with ExitStack() as hooks:
        for module in decoder_of(model).modules():
            if any(name.endswith(_FREQUENCIES) for name, _ in module.named_buffers(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(saw, with_kwargs=True))
        yield calls


def length_that_changes(calls: list[Call], longest: int) -> int | None:
    """The fewest tokens of a sample, up to `longest`, that change the frequencies of other tokens; None where none
    does."""
    lengths = (_of_one_call(*call, longest) for call in calls)
    return min((length for length in lengths if length is not None), default=None)


@torch.no_grad()
def _of_one_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], longest: int) -> int | None:
    def given(length: int) -> list[Tensor]:
        """What the module gives for all tokens but the last, which is at position `length` - 1."""
        own = copy.deepcopy(module)  # some modules keep frequencies from call to call
        made = own(*(_few(value, length) for value in args), **{k: _few(v, length) for k, v in kwargs.items()})
        return [value[..., :-1, :] for value in (made if isinstance(made, tuple) else (made,))]

    def changes(length: int) -> bool:
        return not all(map(torch.equal, given(length), expected))

    shortest, expected = _NUM_TOKENS, given(_NUM_TOKENS)
    if shortest >= longest or not changes(longest):
        return None
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        shortest, longest = (shortest, middle) if changes(middle) else (middle, longest)
    return longest


def _few(value: Any, length: int) -> Any:
    """`value`, if it has positions, with those of a few tokens: the first, and the last of a sample of this length."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim == 0:
        return value
    positions = value[..., :_NUM_TOKENS].clone()
    positions[..., -1] = length - 1
    return positions
