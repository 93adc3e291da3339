"""Image features: outputs of frozen vision and projector, computed once and given to the forward instead of pixels.

Where bits are promised, each image goes through the frozen components alone, so the bits of its features do not depend
on which other images were missing from the cache. A trial finds which fields of the output a family's forward reads and
how the fields of several images are joined: the decoder must receive the same tensors as from pixels.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from mmtrain.dataset.image_inputs import Features, ImageInputs
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.components import base_model, decoder_of
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.model.transfer import PinnedMemory, all_on_device
from mmtrain.safe_text import error_line

_KEYWORD = "mm_encoder_outputs"
_SIZES = ((112, 84), (84, 168))
_TOLERANCE = {torch.float32: 1e-4}
"""Largest relative difference (L2) of the decoder's inputs between two images at once and one by one. Rounding is 1e-6
in float32; if images are confused, the difference is about 1."""
_LOW_TOLERANCE = 0.1
"""The same for types of fewer bits."""

Joining = str | tuple["Joining", ...]
"""How the fields of single images are joined: the `rows` of tensors or the `images` of lists one after another, or a
list with a joining for each of its items."""


Place = Callable[[dict[str, Tensor]], dict[str, Any]]
"""Puts the inputs of images where a model wants them."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of image features that a model's forward reads."""

    kind: type
    joinings: dict[str, Joining]
    can_be_split: bool = False
    """Whether what is computed of several images at once is that of each, one after another."""

    def split(self, output: Any, num_placeholders: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of each image, by path, from the features of images with so many placeholders. Raises ValueError
        if they cannot be taken apart."""
        each: list[dict[str, Tensor]] = [{} for _ in num_placeholders]
        for name, joining in self.joinings.items():
            for own, value in zip(each, _split(joining, getattr(output, name), num_placeholders), strict=True):
                own |= _flat(value, name)
        return each

    def join(self, each: Sequence[dict[str, Tensor]]) -> Any:
        """The features of several images, as the model's own output type. `each` has the tensors of one image."""
        values = {
            name: _join(joining, [_nested(tensors, name) for tensors in each])
            for name, joining in self.joinings.items()
        }
        return self.kind(**values)


class ImageFeatures:
    """Gives the features of a batch's images: those that `store` has, and the others computed and, where there is room,
    kept.

    `together`: images that are missing go through the frozen components at once, which is faster; one by one, their
    bits do not depend on each other.
    """

    def __init__(
        self, model: Any, store: FeatureStore, fields: Fields, place: Place | None = None, together: bool = False
    ) -> None:
        self._model = base_model(model)
        self.store = store
        self._fields = fields
        self._place = place or _placing(self._model)
        self._together = together and fields.can_be_split
        self._memory = PinnedMemory()

    @torch.no_grad()
    def of(self, images: Sequence[ImageInputs]) -> dict[str, Any]:
        """The argument of the model's forward, on its device. To be called under the autocast of the training."""
        # an earlier micro-batch may have had the same image while this one was decoded ahead
        found = {image.key: image.features or self.store.find(image.key) for image in images}
        missing = list({image.key: image for image in images if found[image.key] is None}.values())
        groups = [missing] if self._together and missing else [[image] for image in missing]
        device = self._model.device
        tensors = {key: all_on_device(own.tensors, device) for key, own in found.items() if own is not None}
        for group in groups:
            tensors |= zip((image.key for image in group), self._computed(group), strict=True)
        for image in missing:
            self._cache(image, tensors[image.key])
        return {_KEYWORD: {"image": self._fields.join([tensors[image.key] for image in images])}}

    def _computed(self, images: Sequence[ImageInputs]) -> list[dict[str, Tensor]]:
        """What is kept of each image, by path, on the device."""
        names = images[0].inputs
        inputs = {name: torch.cat([image.inputs[name] for image in images]) for name in names} if images[1:] else names
        output = _output(self._model, inputs, self._place)
        counts = [image.num_placeholders for image in images]
        found = self._fields.split(output, counts)
        for image, tensors in zip(images, found, strict=True):
            if _num_rows(tensors) != image.num_placeholders:
                raise UserError(f"{image.num_placeholders} placeholders for {_num_rows(tensors)} features of images")
        return found

    def _cache(self, image: ImageInputs, tensors: dict[str, Tensor]) -> None:
        """On the CPU, sharing memory with nothing, and without waiting for a GPU unless a file is written."""
        features = Features(tensors, image.other_inputs, image.num_placeholders)
        if not self.store.has_room(features.num_bytes):
            return
        wait = self.store.is_on_disk or self._model.device.type != "cuda"
        own = {
            name: torch.empty_like(value, device="cpu").copy_(value) if wait else self._memory.copy_of(value)
            for name, value in tensors.items()
        }
        self.store.add(image.key, replace(features, tensors=own))


@torch.no_grad()
def find_fields(model: Any, processor: ChatProcessor) -> Fields | str:
    """The fields of image features that the forward of `model` reads, found by a trial with two images of noise.

    If features cannot be cached, the reason: the forward does not take them, or takes something else in addition, or
    they depend on trainable weights.
    """
    base, token_id = base_model(model), processor.image_token_id
    if token_id is None:
        return "this model takes no images"
    if _KEYWORD not in inspect.signature(base.forward).parameters:
        return "models of this family do not take cached features"
    if processor.images is not None and processor.images.traits.by_sample:
        return "what the model makes of an image depends on the other images of its sample"
    if not processor.lays_out_together:
        return "the inputs for an image depend on the text"
    try:
        return _found_fields(base, processor, token_id)
    except Exception as error:  # an unusual family can raise anything; its images are then given as pixels
        return f"its trial failed with {error_line(error)}"


def _found_fields(model: Any, processor: ChatProcessor, token_id: int) -> Fields | str:
    noise = np.random.default_rng(0)
    images = [PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in _SIZES]
    pixels, ids = processor.image_inputs([images])
    made = [processor.image_inputs([[image]]) for image in images]
    alone = [ImageInputs("", own.count(token_id), inputs, None) for inputs, own in made]
    place = _placing(model)
    expected = given_to_decoder(model, ids, place(pixels))
    joint = _output(model, pixels, place)
    read = _Read(joint)
    others = place({name: torch.cat([one.other_inputs[name] for one in alone]) for name in alone[0].other_inputs})
    given_to_decoder(model, ids, others | {_KEYWORD: {"image": read}})
    with torch.enable_grad():
        outputs = [_output(model, image.inputs, place) for image in alone]
    joinings = {
        name: _joining(value, [getattr(output, name) for output in outputs])
        for name in read.names
        if (value := getattr(joint, name)) is not None
    }
    fields = Fields(type(joint), joinings)
    tensors = [dict(item for name in joinings for item in _flat(getattr(output, name), name)) for output in outputs]
    if any(value.requires_grad for own in tensors for value in own.values()):
        return "the features depend on trainable weights"
    if (rows := [_num_rows(own) for own in tensors]) != (counts := [image.num_placeholders for image in alone]):
        return f"trial images have {rows} features for {counts} placeholders"
    found = given_to_decoder(model, ids, others | {_KEYWORD: {"image": fields.join(tensors)}})
    if not _are_equal(found, expected):
        return "cached features give the language model other inputs than pixels"
    return replace(fields, can_be_split=_can_be_split(fields, joint, pixels, alone, tensors))


def _can_be_split(
    fields: Fields,
    joint: Any,
    inputs: dict[str, Tensor],
    alone: Sequence[ImageInputs],
    each: Sequence[dict[str, Tensor]],
) -> bool:
    """Whether the inputs of several images are those of each, one after another, and so is their output, `joint`."""
    try:
        if any(not torch.equal(torch.cat([one.inputs[name] for one in alone]), all_) for name, all_ in inputs.items()):
            return False
        found = fields.split(joint, [one.num_placeholders for one in alone])
    except (RuntimeError, ValueError):  # tensors that cannot be joined or taken apart
        return False
    return all(
        own.keys() == other.keys() and _are_equal(list(own.values()), list(other.values()))
        for own, other in zip(found, each, strict=True)
    )


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


def given_to_decoder(model: Any, ids: list[int], inputs: dict[str, Any]) -> list[Tensor]:
    """Every tensor that the decoder receives for one row of `ids` and `inputs`, which are on the model's device, except
    these inputs themselves. Raises ValueError if it is not called."""
    passed_on = {id(value) for value in inputs.values()}

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached([value for _, value in _flat([list(args), kwargs], "") if id(value) not in passed_on])

    input_ids = torch.tensor([ids], device=model.device)
    types = (input_ids == model.config.image_token_id).long()
    takes = inspect.signature(model.forward).parameters
    inputs = inputs | {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    positions = torch.arange(len(ids), device=model.device)[None]
    hook = decoder_of(model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=input_ids, position_ids=positions, use_cache=False, **inputs)
    except _Reached as reached:
        return reached.given
    finally:
        hook.remove()
    raise ValueError("the decoder was not called")


def _placing(model: Any) -> Place:
    return lambda inputs: all_on_device(inputs, model.device)


def _output(model: Any, inputs: dict[str, Tensor], place: Place) -> Any:
    """The output of vision tower and projector for the images in `inputs`."""
    takes = inspect.signature(model.get_image_features).parameters
    own = place({name: value for name, value in inputs.items() if name in takes})
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


def _joining(joint: Any, alone: Sequence[Any]) -> Joining:
    """How `joint` is joined from `alone`. Raises ValueError if it is not."""
    if isinstance(joint, Tensor):
        return "rows"
    if len(joint) == sum(map(len, alone)):
        return "images"
    return tuple(_joining(inner, own) for inner, *own in zip(joint, *alone, strict=True))


def _join(joining: Joining, values: Sequence[Any]) -> Any:
    if joining == "rows":
        return torch.cat(list(values))
    if joining == "images":
        return tuple(inner for value in values for inner in value)
    return [_join(inner, own) for inner, *own in zip(joining, *values, strict=True)]


def _split(joining: Joining, value: Any, shares: Sequence[int]) -> list[Any]:
    """The inverse of `_join`; rows in proportion to `shares`."""
    if len(shares) == 1:
        return [value]
    if joining == "rows":
        return list(torch.split(value, [len(value) * share // sum(shares) for share in shares]))
    if joining == "images":
        return [(inner,) for inner in value]
    parts = [_split(inner, own, shares) for inner, own in zip(joining, value, strict=True)]
    return [list(own) for own in zip(*parts, strict=True)]


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
