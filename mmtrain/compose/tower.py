"""The image encoder that goes into a composed model: loaded as it is, and tried on one image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import AutoModel, PreTrainedModel

from mmtrain.encoding.directory import make_image_processor, model_directory
from mmtrain.errors import UserError
from mmtrain.model.adapter import find_adapter, find_model
from mmtrain.model.load import load_weights
from mmtrain.safe_text import one_line

_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_PROBE_SIZE = (300, 200)
"""(width, height) of the image on which a tower is tried."""


@dataclass(frozen=True, slots=True)
class Tower:
    """An image encoder whose features are one vector for each square patch, in rows from the top left."""

    model: Any
    image_processor: Any
    image_size: int
    """The side in pixels of the images that it is given."""
    patch_size: int
    """The side of a patch in pixels."""
    feature_layer: int
    """The index of the hidden states that are its features, as in `hidden_states` of transformers."""
    has_class_token: bool
    """Whether one more vector precedes those of the patches; it is not a feature."""
    probe_pixels: torch.Tensor
    """One image as `image_processor` makes it, (1, 3, image_size, image_size)."""
    probe_features: torch.Tensor
    """Its features, (1, num_patches, width)."""

    @property
    def side(self) -> int:
        """The patches in a row, and the rows."""
        return self.image_size // self.patch_size

    @property
    def selection(self) -> str:
        """transformers' name for the features used: "default" without the first vector, "full" with all."""
        return "default" if self.has_class_token else "full"


def directory_of_tower(path: str) -> str:
    """`path`, or the model that a run in this directory saved. Raises UserError where the run saved an adapter."""
    if (adapter := find_adapter(Path(path))) is not None:
        raise UserError(
            f"--vision {path}: {adapter} is an adapter: merge it with `mmtrain merge`, and give the merged model"
        )
    found = find_model(Path(path))
    return path if found is None else str(found)


def load_tower(path: str, dtype: str, feature_layer: int) -> Tower:
    """The image encoder in a model directory: alone, or next to a text encoder as in CLIP.

    Raises UserError if the directory is broken, or if the encoder does not give one vector for each patch.
    """
    model = _image_encoder(load_weights(path, dtype, auto=AutoModel), path)
    image_processor, pixels = _load_image_processor(path)
    hidden = _hidden_states(model, pixels, path)
    if not -len(hidden) <= feature_layer < len(hidden):
        raise UserError(f"--feature-layer {feature_layer}: {path}: expected -{len(hidden)} to {len(hidden) - 1}")
    patch_size = _patch_size(model, pixels, path)
    num_patches = (pixels.shape[-1] // patch_size) ** 2
    features = hidden[feature_layer]
    num_more = features.shape[1] - num_patches if features.ndim == 3 else -1
    if num_more not in (0, 1) or features.shape[-1] != model.config.hidden_size:
        raise UserError(
            f"{path}: {type(model).__name__} gives features of shape {tuple(features.shape[1:])} for {num_patches} "
            "patches: expected one vector for each, after at most one class token; use CLIP, SigLIP or DINOv2"
        )
    features = features[:, num_more:]
    return Tower(model, image_processor, pixels.shape[-1], patch_size, feature_layer, num_more == 1, pixels, features)


def _load_image_processor(path: str) -> tuple[Any, torch.Tensor]:
    """The image processor in a model directory, and what it makes of one image. Raises UserError."""
    directory = model_directory(path)
    if not any((directory / name).is_file() for name in _IMAGE_SETTINGS):
        raise UserError(
            f"{path}: it has no {_IMAGE_SETTINGS[0]}: expected an image encoder in the same directory as its image "
            "processor"
        )
    try:
        processor = make_image_processor(directory, {})
        return processor, processor(PIL.Image.new("RGB", _PROBE_SIZE), return_tensors="pt")["pixel_values"]
    except Exception as error:  # a broken file makes transformers raise anything
        raise UserError(f"{path}: the image processor cannot be loaded: {one_line(error)}") from None


def _patch_size(model: Any, pixels: torch.Tensor, path: str) -> int:
    """The side of a patch. Raises UserError unless an image becomes one square with square patches."""
    found = getattr(model.config, "patch_size", None)
    if type(found) is not int or pixels.ndim != 4 or len(pixels) != 1 or pixels.shape[-1] != pixels.shape[-2]:
        raise UserError(
            f"{path}: {type(model).__name__} has patches of {found} pixels in pixels of shape {tuple(pixels.shape)}: "
            "expected square patches in one square image; use CLIP, SigLIP or DINOv2"
        )
    return found


def _image_encoder(model: Any, path: str) -> Any:
    """`model`, or its part that encodes images where it encodes text too."""
    config = getattr(model.config, "vision_config", None)
    if config is None:
        return model
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model)
    found = next((part for part in parts if type(part.config) is type(config)), None)
    if found is None:
        raise UserError(f"{path}: no image encoder was found in {type(model).__name__}: give the directory of one")
    return found


@torch.no_grad()
def _hidden_states(model: Any, pixels: torch.Tensor, path: str) -> tuple[torch.Tensor, ...]:
    """The hidden states of the encoder for one image, from the embeddings to the last layer."""
    try:
        found = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    except Exception as error:  # a model that takes something else can raise anything
        shape = "x".join(map(str, pixels.shape))
        raise UserError(
            f"{path}: {type(model).__name__} does not encode an image from its pixels alone, {shape} as its image "
            f"processor makes them ({one_line(error)}): use an encoder with a fixed resolution, such as CLIP, SigLIP "
            "or DINOv2, with its own image processor"
        ) from None
    return tuple(found or ())
