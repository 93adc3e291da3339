"""Features of pictures: what frozen parts make of them, computed once and taken by the forward pass in place of pixels.

Each picture goes through the frozen parts alone, so that the bits of its features do not depend on which others were
missing when they were computed. Which fields of the output a family's forward reads, and how those of several pictures
are put together, is not known here but found out: the decoder must be given the same as from pixels.
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
from mmtrain.safe_text import one_line

_KEYWORD = "mm_encoder_outputs"
_SIZES = ((112, 84), (84, 168))
_TOLERANCE = {torch.float32: 1e-4}
"""Largest relative difference (L2) of what the decoder is given from two pictures at once and one by one. Rounding is
1e-6 in float32; pictures that are mixed up differ by 1."""
_LOW_TOLERANCE = 0.1
"""The same in types of fewer bits."""

Layout = str | tuple["Layout", ...]
"""How a field of several pictures comes from each one's: `rows` of a tensor or `pictures` of a list one behind the
other, or a list whose places each have a layout."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What a forward reads of its picture features."""

    kind: type
    layouts: dict[str, Layout]

    def join(self, each: Sequence[dict[str, Tensor]]) -> Any:
        """The model's own output for pictures whose tensors are `each`."""
        values = {
            name: _join(layout, [_nested(tensors, name) for tensors in each]) for name, layout in self.layouts.items()
        }
        return self.kind(**values)


class PictureFeatures:
    """Gives the features of a batch's pictures: those that `store` has, and the others computed and kept."""

    def __init__(self, model: Any, store: FeatureStore, fields: Fields) -> None:
        self._model = _base(model)
        self.store = store
        self._fields = fields

    @torch.no_grad()
    def of(self, pictures: Sequence[ImageInputs]) -> dict[str, Any]:
        """The argument of the model's forward, on its device. To be called under the autocast of the training."""
        each = [self._features(picture).tensors for picture in pictures]
        device = self._model.device
        on_device = [{name: value.to(device, non_blocking=True) for name, value in own.items()} for own in each]
        return {_KEYWORD: {"image": self._fields.join(on_device)}}

    def _features(self, picture: ImageInputs) -> Features:
        # an earlier micro-batch may have had the same picture while this one was decoded ahead
        found = picture.features or self.store.find(picture.key)
        if found is None:
            tensors = self._fields_of(_output(self._model, picture.inputs))
            if _num_rows(tensors) != picture.num_placeholders:
                raise UserError(
                    f"{picture.num_placeholders} placeholders for {_num_rows(tensors)} features of pictures"
                )
            found = Features(tensors, picture.other_inputs, picture.num_placeholders)
            self.store.keep(picture.key, found)
        return found

    def _fields_of(self, output: Any) -> dict[str, Tensor]:
        """The tensors that are kept, by path; on the CPU, sharing memory with nothing."""
        flat = {path: value for name in self._fields.layouts for path, value in _flat(getattr(output, name), name)}
        return {path: torch.empty_like(value, device="cpu").copy_(value) for path, value in flat.items()}


@torch.no_grad()
def find_fields(model: Any, processor: ChatProcessor) -> Fields | str:
    """What the forward of `model` reads of features, by trying with two images of noise; or why the features cannot be
    cached: the forward does not take them, or takes something else next to them, or they depend on trainable weights.
    """
    base, token_id = _base(model), processor.image_token_id
    if token_id is None:
        return "this model takes no images"
    if _KEYWORD not in inspect.signature(base.forward).parameters:
        return "models of this family do not take cached features"
    if processor.images is not None and processor.images.traits.by_sample:
        return "what the model makes of an image depends on the other images of its sample"
    if not processor.lays_out_together:
        return "inputs of this model for its images depend on the text"
    try:
        return _found_fields(base, processor, token_id)
    except Exception as error:  # a family that does otherwise can raise anything; its images then go in as pixels
        return f"its trial failed with {type(error).__name__}: {one_line(error)}"


def _found_fields(model: Any, processor: ChatProcessor, token_id: int) -> Fields | str:
    noise = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in _SIZES]
    pixels, ids = processor.image_inputs([pictures])
    made = [processor.image_inputs([[picture]]) for picture in pictures]
    alone = [ImageInputs("", own.count(token_id), inputs, None) for inputs, own in made]
    expected = _given_to_decoder(model, token_id, ids, pixels)
    joint = _output(model, pixels)
    read = _Read(joint)
    beside = {name: torch.cat([one.other_inputs[name] for one in alone]) for name in alone[0].other_inputs}
    _given_to_decoder(model, token_id, ids, beside | {_KEYWORD: {"image": read}})
    with torch.enable_grad():
        outputs = [_output(model, picture.inputs) for picture in alone]
    layouts = {
        name: _layout(value, [getattr(output, name) for output in outputs])
        for name in read.names
        if (value := getattr(joint, name)) is not None
    }
    fields = Fields(type(joint), layouts)
    tensors = [dict(item for name in layouts for item in _flat(getattr(output, name), name)) for output in outputs]
    if any(value.requires_grad for own in tensors for value in own.values()):
        return "the features depend on trainable weights"
    if (rows := [_num_rows(own) for own in tensors]) != (counts := [picture.num_placeholders for picture in alone]):
        return f"trial images have {rows} features for {counts} placeholders"
    found = _given_to_decoder(model, token_id, ids, beside | {_KEYWORD: {"image": fields.join(tensors)}})
    return fields if _are_equal(found, expected) else "cached features give the language model other inputs than pixels"


class _Read:
    """An output that notes which of its fields are read."""

    def __init__(self, output: Any) -> None:
        self.names: dict[str, None] = {}
        self._output = output

    def __getattr__(self, name: str) -> Any:
        self.names[name] = None
        return getattr(self._output, name)


class _Reached(Exception):
    """The decoder was called: what follows is not needed."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given


def _given_to_decoder(model: Any, token_id: int, ids: list[int], inputs: dict[str, Any]) -> list[Tensor]:
    """Every tensor that the decoder gets. Raises ValueError where it is not called."""

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached([value for _, value in _flat([list(args), kwargs], "")])

    input_ids = torch.tensor([ids], device=model.device)
    types = (input_ids == token_id).long()
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
    raise ValueError("the decoder was not reached")


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _output(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What the vision tower and the projector make of the pictures in `inputs`."""
    takes = inspect.signature(model.get_image_features).parameters
    own = {name: value.to(model.device) for name, value in inputs.items() if name in takes}
    return model.get_image_features(**own, return_dict=True)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists and dicts with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{place}")


def _nested(tensors: dict[str, Tensor], path: str) -> Any:
    """The value under `path` that `_flat` took apart."""
    if path in tensors:
        return tensors[path]
    places = {int(name[len(path) + 1 :].partition(".")[0]) for name in tensors if name.startswith(f"{path}.")}
    return [_nested(tensors, f"{path}.{place}") for place in sorted(places)]


def _layout(joint: Any, alone: Sequence[Any]) -> Layout:
    """How `joint` comes from `alone`. Raises ValueError where it does not."""
    if isinstance(joint, Tensor):
        return "rows"
    if len(joint) == sum(map(len, alone)):
        return "pictures"
    return tuple(_layout(inner, own) for inner, *own in zip(joint, *alone, strict=True))


def _join(layout: Layout, values: Sequence[Any]) -> Any:
    if layout == "rows":
        return torch.cat(list(values))
    if layout == "pictures":
        return tuple(inner for value in values for inner in value)
    return [_join(inner, own) for inner, *own in zip(layout, *values, strict=True)]


def _num_rows(tensors: dict[str, Tensor]) -> int:
    """Embeddings in the first field, of which each placeholder takes one."""
    first = next(iter(tensors)).partition(".")[0]
    return sum(value.numel() // value.shape[-1] for name, value in tensors.items() if name.partition(".")[0] == first)


def _are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = _TOLERANCE.get(expected.dtype, _LOW_TOLERANCE)
    return float((found - expected).norm()) <= tolerance * float(expected.norm())
