"""Tiny image encoders with random weights, as model directories: what `mmtrain compose` takes and refuses."""

from pathlib import Path
from typing import Any

from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from support.builders import randomized

SIZE, PATCH = 28, 7
SIDE = SIZE // PATCH
WIDTH = 32
_SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_SQUARE = {"height": SIZE, "width": SIZE}
_CROPPED: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE}


def make_clip_tower(path: Path) -> Path:
    """CLIP's image encoder alone."""
    CLIPImageProcessorPil(**_CROPPED).save_pretrained(path)
    return randomized(CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, projection_dim=32, **_SMALL)), path)


def make_clip(path: Path) -> Path:
    """CLIP with both encoders, as contrastive training has it."""
    CLIPImageProcessorPil(**_CROPPED).save_pretrained(path)
    vision = CLIPVisionConfig(intermediate_size=64, projection_dim=32, **_SMALL)
    text = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    both = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    return randomized(CLIPModel(both), path)


def make_siglip(path: Path) -> Path:
    """SigLIP (and SigLIP 2 of a fixed resolution, which has the same classes): no class token."""
    SiglipImageProcessorPil(size=_SQUARE).save_pretrained(path)
    vision = SiglipVisionConfig(intermediate_size=64, **_SMALL)
    text = SiglipTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    both = SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    return randomized(SiglipModel(both), path)


def make_dinov2(path: Path) -> Path:
    BitImageProcessorPil(**_CROPPED).save_pretrained(path)
    return randomized(Dinov2Model(Dinov2Config(mlp_ratio=2, **_SMALL)), path)


TOWERS = {"clip_tower": make_clip_tower, "clip": make_clip, "siglip": make_siglip, "dinov2": make_dinov2}


def make_registers(path: Path) -> Path:
    """DINOv2 with four more vectors next to the class token."""
    BitImageProcessorPil(**_CROPPED).save_pretrained(path)
    return randomized(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=2, **_SMALL)), path)


def make_any_resolution(path: Path) -> Path:
    """SigLIP 2 of any resolution: it takes patches, a mask and the shape of the image."""
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=SIDE**2).save_pretrained(path)
    settings = {key: value for key, value in _SMALL.items() if key != "image_size"}
    return randomized(
        Siglip2VisionModel(Siglip2VisionConfig(intermediate_size=64, num_patches=SIDE**2, **settings)), path
    )


def make_convnet(path: Path) -> Path:
    """Convolutions without patches: features in a grid of channels."""
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(path)
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return randomized(ConvNextModel(config), path)
