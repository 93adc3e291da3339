"""The vision tower on a GPU: one attention kernel a layer for all images, and nothing that waits for the device.

Many towers lay the patches of all images in one row, as samples are packed, and attend within stretches of it: images
or windows. With `sdpa` transformers takes such a row apart in every layer, asks the device for the lengths of the
stretches and attends to one after the other. An attention whose name has "flash" in it is given the whole row and the
ends of its stretches. Ours is registered under such a name.

What follows from the sizes of the images (ends, positions, the order of patches in windows) is computed on the CPU.
transformers has that for exporting models; its towers take the results as arguments.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.raw_pixels import Normalization, find_normalization
from mmtrain.model.attention import autocast, fits_varlen, has_varlen, varlen
from mmtrain.model.components import base_model
from mmtrain.model.image_cache.features import given_to_decoder
from mmtrain.model.transfer import all_on_device
from mmtrain.safe_text import error_line

NAME = "mmtrain_flash_images"
_SEEN = "seen_by_kernel"
"""A list in the keywords of the forward: whether the kernel took each call of the attention with stretches."""
_TOLERANCE = 0.1
"""Largest relative difference (L2) of what the decoder is given, and of the gradient of the pixels, in 16 bits."""
_SIZES = ((196, 140), (84, 168), (56, 56))
"""(width, height) of the images of the trial."""


class VisionInputs:
    """Puts the inputs of images where a model wants them: pixels on its device, and what follows from their sizes.

    `normalization`: of pixels of 8 bits, on that device; None where there are none.
    """

    def __init__(self, model: Any, tower: Any = None, normalization: Normalization | None = None) -> None:
        self.normalization = normalization
        self.model = model
        self.tower = tower
        self._takes = frozenset(() if tower is None else inspect.signature(tower.forward).parameters)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments for `inputs`, on the CPU. Where the tower takes what follows from the images' sizes, the sizes
        themselves stay on the CPU: the model asks for their values."""
        device = self.model.device
        pixels = {name: value for name, value in inputs.items() if name.startswith("pixel")}
        sizes = {name: value for name, value in inputs.items() if name not in pixels}
        if self.tower is None or not pixels:
            return self._normalized(all_on_device(inputs, device))
        return self._normalized(all_on_device(pixels | self._computed(sizes), device)) | sizes

    def _normalized(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with pixels of 8 bits as the processor would have given them."""
        if self.normalization is None:
            return inputs
        raw = {name: value for name, value in inputs.items() if name.startswith("pixel") and value.dtype == torch.uint8}
        return inputs | {name: self.normalization(value) for name, value in raw.items()}

    def _computed(self, sizes: dict[str, Tensor]) -> dict[str, Any]:
        """By the names under which a model passes them on to its tower."""
        from transformers.exporters.utils import precompute_export_inputs  # a second to import

        own = {short: value for name, value in sizes.items() if (short := name.removeprefix("image_")) in self._takes}
        made: dict[str, Any] = dict(own)
        precompute_export_inputs(self.tower, made)
        return {f"image_{name}": value for name, value in made.items() if name not in own and value is not None}


def prepare_vision(
    model: Any, processor: ChatProcessor, device: torch.device, say: Callable[[str], None]
) -> VisionInputs:
    """Give the tower of `model` what is said above, each where a trial on random images shows that the decoder is given
    the same; `say` reports in one line what is not. To be called under the autocast of the training.

    `device`: where the model will compute, which is not its own yet where its weights are to be sharded. Nothing is
    changed on devices without the kernel, nor for a tower without stretches.
    """
    base = base_model(model)
    tower = base.get_encoder(modality="image") if processor.images is not None else None
    normalization = _normalization(processor, device, say)
    plain = VisionInputs(base, normalization=normalization)
    if not has_varlen(device) or not isinstance(tower, PreTrainedModel) or tower is base:
        return plain
    if device.type == "cuda" and base.device.type == "cpu":
        say("vision: one attention kernel a layer is not tried, because the weights are sharded")
        return plain
    return _prepared(plain, VisionInputs(base, tower, normalization), processor, say)


def _normalization(processor: ChatProcessor, device: torch.device, say: Callable[[str], None]) -> Normalization | None:
    """On a GPU: pixels of 8 bits are a quarter of the bytes to copy. On the CPU they stay the processor's own."""
    if processor.images is None or device.type != "cuda":
        return None
    found = find_normalization(processor)
    if isinstance(found, str):
        say(f"images: copied as floats and not as 8-bit pixels, because {found}")
        return None
    return found.to(device)


def _prepared(
    plain: VisionInputs, computed: VisionInputs, processor: ChatProcessor, say: Callable[[str], None]
) -> VisionInputs:
    try:
        trial = _Trial(plain, processor)
    except Exception as error:  # a family that is not supported can raise anything; training reports it
        say(f"vision: its trial failed with {error_line(error)}")
        return plain
    if why := _why_attention_stays(trial, computed.tower):
        say(f"vision: attention goes image by image and window by window, because {why}")
    if why := trial.fault(computed):
        say(f"vision: what follows from the sizes of images is computed on the GPU, because {why}")
        return plain
    return computed


def _why_attention_stays(trial: "_Trial", tower: Any) -> str | None:
    """Change the attention of `tower` where that passes; the reason where it is tried and does not."""
    if tower.config._attn_implementation != "sdpa":
        return None
    _set_attention(tower, NAME)
    fault, seen = trial.fault(trial.plain), trial.seen
    if not fault and seen and all(seen):
        return None
    _set_attention(tower, "sdpa")
    return fault or ("the GPU has no kernel for its type or width of heads" if seen else None)


def _set_attention(tower: Any, name: str) -> None:
    """What the tower's `set_attn_implementation` does, which would look for a package where "flash" is in the name."""
    configs = (module.config for module in tower.modules() if isinstance(module, PreTrainedModel))
    for config in {id(config): config for config in configs}.values():
        config._attn_implementation = name


class _Trial:
    """What the decoder is given for images of noise as `plain` places them, compared with other ways."""

    def __init__(self, plain: VisionInputs, processor: ChatProcessor) -> None:
        self.plain, self._processor = plain, processor
        self.seen: list[bool] = []
        """What `_SEEN` lists after the last run."""
        self._expected = self._run(plain)

    def fault(self, inputs: VisionInputs) -> str | None:
        """Why the decoder is not given the same; None where it is."""
        try:
            found = self._run(inputs)
        except Exception as error:
            return f"the trial failed with {error_line(error)}"
        if [value.shape for value in found] != [value.shape for value in self._expected]:
            return "the decoder is given other tensors"
        furthest = max(map(_difference, found, self._expected))
        return f"the decoder is given values that differ by {furthest:.0%}" if not furthest <= _TOLERANCE else None

    def _run(self, inputs: VisionInputs) -> list[Tensor]:
        """What the decoder is given, and the gradient of the pixels."""
        noise, self.seen = np.random.default_rng(0), []
        images = [PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in _SIZES]
        made, ids = self._processor.image_inputs([images])
        placed = inputs(made)
        pixels = [v.requires_grad_() for k, v in placed.items() if k.startswith("pixel") and v.is_floating_point()]
        with torch.enable_grad():
            given = given_to_decoder(inputs.model, ids, placed | {_SEEN: self.seen})
            out = [value for value in given if value.requires_grad]
            outer = [torch.cos(torch.arange(value.numel(), device=value.device)).view_as(value) for value in out]
            gradients = torch.autograd.grad(out, pixels, [o.to(v) for o, v in zip(outer, out, strict=True)])
        return [value.detach() for value in (*given, *gradients)]


def _difference(found: Tensor, expected: Tensor) -> float:
    own, other = found.double(), expected.double()
    return 0.0 if torch.equal(own, other) else float((own - other).norm() / other.norm())


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    seen_by_kernel: list[bool] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, length, heads, width) from query, key and value (1, heads, length, width), within the stretches that end at
    `cu_seq_lens_q` (1 + stretches,) int32; without these as `sdpa`."""
    if cu_seq_lens_q is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    query, key, value = autocast(query, key, value)
    takes = fits_varlen(query, key, value) and has_varlen(query.device)
    if seen_by_kernel is not None:
        seen_by_kernel.append(takes)
    if not takes:
        lengths = cu_seq_lens_q.diff().tolist()
        each = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
        kwargs |= {"is_causal": False}
        rows = [sdpa_attention_forward(module, *own, None, dropout, scaling, **kwargs)[0] for own in each]
        return torch.cat(rows, dim=1), None
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
    return varlen(query, key, value, cu_seq_lens_q, longest, scaling), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
