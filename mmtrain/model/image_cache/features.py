"""Image features: outputs of frozen vision and projector, computed once and given to the forward instead of pixels.

Each image goes through the frozen components alone, so the bits of its features do not depend on which other images
were missing from the cache. A trial finds which fields of the output a family's forward reads and how the fields of
several images are joined: the decoder must receive the same tensors as from pixels.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from peft import PeftModel
from torch import Tensor, nn

from mmtrain.dataset.image_inputs import Features, ImageInputs
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.model.transfer import on_device
from mmtrain.safe_text import one_line

_KEYWORD = "mm_encoder_outputs"
_SIZES = ((112, 84), (84, 168))
_TOLERANCE = {torch.float32: 1e-4}
"""Largest relative difference (L2) of the decoder's inputs between two images at once and one by one. Rounding is 1e-6
in float32; if images are confused, the difference is about 1."""
_LOW_TOLERANCE = 0.1
"""The same for types of fewer bits."""

Layout = str | tuple["Layout", ...]
"""How the fields of single images are joined: the `rows` of tensors or the `images` of lists one after another, or a
list with a layout for each of its items."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of image features that a model's forward reads."""

    kind: type
    layouts: dict[str, Layout]

    def join(self, each: Sequence[dict[str, Tensor]]) -> Any:
        """The features of several images, as the model's own output type. `each` has the tensors of one image."""
        values = {
            name: _join(layout, [_nested(tensors, name) for tensors in each]) for name, layout in self.layouts.items()
        }
        return self.kind(**values)


class ImageFeatures:
    """The features of a batch's images: from `store`, or computed and then stored."""

    def __init__(self, model: Any, store: FeatureStore, fields: Fields) -> None:
        self._model = _base(model)
        self.store = store
        self._fields = fields

    @torch.no_grad()
    def of(self, images: Sequence[ImageInputs]) -> dict[str, Any]:
        """The argument of the model's forward, on its device. Call it under the autocast of training."""
        each = [self._features(image).tensors for image in images]
        device = self._model.device
        moved = [{name: on_device(value, device) for name, value in own.items()} for own in each]
        return {_KEYWORD: {"image": self._fields.join(moved)}}

    def _features(self, image: ImageInputs) -> Features:
        # while this micro-batch was loaded ahead, an earlier one may have computed the same image
        found = image.features or self.store.find(image.key)
        if found is None:
            tensors = self._fields_of(_output(self._model, image.inputs))
            if _num_rows(tensors) != image.num_placeholders:
                raise UserError(f"{image.num_placeholders} placeholders for {_num_rows(tensors)} image features")
            found = Features(tensors, image.other_inputs, image.num_placeholders)
            self.store.add(image.key, found)
        return found

    def _fields_of(self, output: Any) -> dict[str, Tensor]:
        """The tensors to cache, by path; on the CPU, in memory of their own."""
        flat = {path: value for name in self._fields.layouts for path, value in _flat(getattr(output, name), name)}
        return {path: torch.empty_like(value, device="cpu").copy_(value) for path, value in flat.items()}


@torch.no_grad()
def find_fields(model: Any, processor: ChatProcessor) -> Fields | str:
    """The fields of image features that the forward of `model` reads, found by a trial with two images of noise.

    If features cannot be cached, the reason: the forward does not take them, or takes something else in addition, or
    they depend on trainable weights.
    """
    base, token_id = _base(model), processor.image_token_id
    if token_id is None:
        return "this model takes no images"
    if _KEYWORD not in inspect.signature(base.forward).parameters:
        return "models of this family do not take cached features"
    try:
        return _found_fields(base, processor, token_id)
    except Exception as error:  # an unusual family can raise anything; its images are then given as pixels
        return f"its trial failed with {type(error).__name__}: {one_line(error)}"


def _found_fields(model: Any, processor: ChatProcessor, token_id: int) -> Fields | str:
    noise = np.random.default_rng(0)
    images = [PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in _SIZES]
    pixels, ids = processor.image_inputs(images)
    made = [processor.image_inputs([image]) for image in images]
    alone = [ImageInputs("", own.count(token_id), inputs, None) for inputs, own in made]
    expected = _given_to_decoder(model, ids, pixels)
    joint = _output(model, pixels)
    read = _Read(joint)
    others = {name: torch.cat([one.other_inputs[name] for one in alone]) for name in alone[0].other_inputs}
    _given_to_decoder(model, ids, others | {_KEYWORD: {"image": read}})
    with torch.enable_grad():
        outputs = [_output(model, image.inputs) for image in alone]
    layouts = {
        name: _layout(value, [getattr(output, name) for output in outputs])
        for name in read.names
        if (value := getattr(joint, name)) is not None
    }
    fields = Fields(type(joint), layouts)
    tensors = [dict(item for name in layouts for item in _flat(getattr(output, name), name)) for output in outputs]
    if any(value.requires_grad for own in tensors for value in own.values()):
        return "the features depend on trainable weights"
    if (rows := [_num_rows(own) for own in tensors]) != (counts := [image.num_placeholders for image in alone]):
        return f"trial images have {rows} features for {counts} placeholders"
    found = _given_to_decoder(model, ids, others | {_KEYWORD: {"image": fields.join(tensors)}})
    return fields if _are_equal(found, expected) else "cached features give the language model other inputs than pixels"


class _Read:
    """An output that records which of its fields are read."""

    def __init__(self, output: Any) -> None:
        self.names: dict[str, None] = {}
        self._output = output

    def __getattr__(self, name: str) -> Any:
        self.names[name] = None
        return getattr(self._output, name)


class _Reached(Exception):
    """The decoder was called: the rest of the forward is not needed."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given


def _given_to_decoder(model: Any, ids: list[int], inputs: dict[str, Any]) -> list[Tensor]:
    """Every tensor that the decoder receives. Raises ValueError if it is not called."""

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached([value for _, value in _flat([list(args), kwargs], "")])

    input_ids = torch.tensor([ids], device=model.device)
    types = (input_ids == model.config.image_token_id).long()
    takes = inspect.signature(model.forward).parameters
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    moved |= {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    positions = torch.arange(len(ids), device=model.device)[None]
    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=input_ids, position_ids=positions, use_cache=False, **moved)
    except _Reached as reached:
        return reached.given
    finally:
        hook.remove()
    raise ValueError("the decoder was not called")


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _output(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The output of vision tower and projector for the images in `inputs`."""
    takes = inspect.signature(model.get_image_features).parameters
    own = {name: on_device(value, model.device) for name, value in inputs.items() if name in takes}
    return model.get_image_features(**own, return_dict=True)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists and dicts, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{index}")


def _nested(tensors: dict[str, Tensor], path: str) -> Any:
    """The nested value at `path`, from the tensors of `_flat`."""
    if path in tensors:
        return tensors[path]
    indices = {int(name[len(path) + 1 :].partition(".")[0]) for name in tensors if name.startswith(f"{path}.")}
    return [_nested(tensors, f"{path}.{index}") for index in sorted(indices)]


def _layout(joint: Any, alone: Sequence[Any]) -> Layout:
    """How `joint` is joined from `alone`. Raises ValueError if it is not."""
    if isinstance(joint, Tensor):
        return "rows"
    if len(joint) == sum(map(len, alone)):
        return "images"
    return tuple(_layout(inner, own) for inner, *own in zip(joint, *alone, strict=True))


def _join(layout: Layout, values: Sequence[Any]) -> Any:
    if layout == "rows":
        return torch.cat(list(values))
    if layout == "images":
        return tuple(inner for value in values for inner in value)
    return [_join(inner, own) for inner, *own in zip(layout, *values, strict=True)]


def _num_rows(tensors: dict[str, Tensor]) -> int:
    """The number of embeddings in the first field, one per placeholder."""
    first = next(iter(tensors)).partition(".")[0]
    return sum(value.numel() // value.shape[-1] for name, value in tensors.items() if name.partition(".")[0] == first)


def _are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = _TOLERANCE.get(expected.dtype, _LOW_TOLERANCE)
    return float((found - expected).norm()) <= tolerance * float(expected.norm())
