"""What the attention of a vision tower costs, measured on two images: families attend within images, tiles or windows.

The attention function of the tower is replaced for a moment by one that counts. Attention of n queries to m keys takes
2 n m d multiply-additions for scores and values; d is the width of all heads.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.components import base_model
from mmtrain.model.image_cache.features import given_to_decoder
from mmtrain.model.transfer import all_on_device
from mmtrain.safe_text import one_line

_NAME = "mmtrain_counted"
_SIZES = ((112, 112), (224, 224))
"""(width, height) of the images."""


@torch.no_grad()
def image_attention(
    model: Any, processor: ChatProcessor, patches_per_token: float, say: Callable[[str], None]
) -> tuple[float, float]:
    """Multiply-additions of one forward pass of the tower's attention: (per pair of an image's patches, per patch).

    The second is that of windows and tiles, whose number grows with the image; where images end within a window, a
    little of it is in the first. Both are 0 for a model without images, and where they cannot be measured; `say` is
    then given one line.
    """
    base, token_id = base_model(model), processor.image_token_id
    if token_id is None:
        return 0.0, 0.0
    tower = base.get_encoder(modality="image")
    try:
        if not isinstance(tower, PreTrainedModel) or tower is base:
            raise ValueError("the vision tower was not found")
        with torch.device("cpu"), _with_values(base, tower) as computed:
            found = [_measured(base, computed, processor, size) for size in _SIZES]
        if not all(cost for _, cost in found):
            raise ValueError("the vision tower has an attention of its own")
    except Exception as error:  # an unusual family can raise anything
        say(f"cost: the attention to images is not counted: {one_line(error)}")
        return 0.0, 0.0
    return _solved([(count * patches_per_token, cost) for count, cost in found])


def _solved(found: list[tuple[float, float]]) -> tuple[float, float]:
    """The two costs from (patches, cost) of two images: cost = pairs n² + each n."""
    (first, cost), (second, other) = found
    if first == second:
        return cost / first**2, 0.0
    pairs = (other / second - cost / first) / (second - first)
    each = cost / first - pairs * first
    is_sum = pairs >= 0 and each >= 0  # else the number of patches for a placeholder is not the same in both
    return (pairs, each) if is_sum else (other / second**2, 0.0)


def _measured(base: Any, tower: PreTrainedModel, processor: ChatProcessor, size: tuple[int, int]) -> tuple[int, float]:
    """The placeholders of a blank image of this size, and the multiply-additions of the attention to it."""
    pixels, ids = processor.image_inputs([[PIL.Image.new("RGB", size)]])
    inputs = {name: value.to(base.dtype) if value.is_floating_point() else value for name, value in pixels.items()}
    with _counting(tower) as costs, suppress(_Computed):
        given_to_decoder(base, ids, all_on_device(inputs, tower.device))
    return sum(id_ == processor.image_token_id for id_ in ids), sum(costs)


class _Computed(Exception):
    """The tower has run: the rest of the forward is not needed."""


@contextmanager
def _with_values(base: Any, tower: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The tower of `base`; inside, one on the meta device, which has no values, is replaced by one on the CPU with any
    values. Its weights take no memory: they are never written, and the system maps them when they are."""
    if tower.device.type != "meta":
        yield tower
        return
    (name,) = (name for name, module in base.named_modules() if module is tower)
    made = copy.deepcopy(tower).to_empty(device="cpu")
    for buffer in made.buffers():
        buffer.zero_()  # they may be indices
    base.set_submodule(name, made)
    try:
        yield made
    finally:
        base.set_submodule(name, tower)


@contextmanager
def _counting(tower: PreTrainedModel) -> Iterator[list[float]]:
    """Inside, each call of the tower's attention adds its multiply-additions to the list."""
    costs: list[float] = []

    def counted(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, heads, num_queries, width = query.shape
        costs.append(2.0 * rows * heads * num_queries * key.shape[-2] * width)
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    def stop(*_: Any) -> None:
        raise _Computed

    before, hook = tower.config._attn_implementation, tower.register_forward_hook(stop)
    AttentionInterface.register(_NAME, counted)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    tower.set_attn_implementation(_NAME)
    try:
        yield costs
    finally:
        hook.remove()
        tower.set_attn_implementation(before)
