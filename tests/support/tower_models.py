"""Small dual encoders of five families with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, processors
from transformers import (
    AlignConfig,
    AlignModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from support.builders import TINY, randomized

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 48
SIDE = 32


def _tokenizer(path: Path, **settings: Any) -> dict[str, Any]:
    """A tokenizer whose texts end with an end token, and what a text tower's configuration says of it."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": LENGTH,
        **settings,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.token_to_id("<pad>")}
    return {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": LENGTH, **ids}


def _images(path: Path, kind: str, **settings: Any) -> None:
    size = {"height": SIDE, "width": SIDE}
    described = {"image_processor_type": kind, "size": size, "crop_size": size, **settings}
    (path / "preprocessor_config.json").write_text(json.dumps(described))


def make_clip(path: Path) -> Path:
    ids = _tokenizer(path)
    _images(path, "CLIPImageProcessor", size={"shortest_edge": SIDE})
    text = {**SMALL, **ids}
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    return randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), path)


def make_siglip(path: Path) -> Path:
    ids = _tokenizer(path, model_input_names=["input_ids"])
    _images(path, "SiglipImageProcessor")
    text = {**SMALL, **ids, "projection_size": 32}
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    return randomized(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), path)


def make_siglip2(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "Siglip2Tokenizer", "model_input_names": ["input_ids"], "model_max_length": LENGTH}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"vocab_size": len(letters), "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1}
    _images(path, "Siglip2ImageProcessor", max_num_patches=16, patch_size=8)
    text = {**SMALL, **ids, "projection_size": 32}
    vision = {**SMALL, "patch_size": 8, "num_patches": 16}
    return randomized(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)), path)


def make_chinese_clip(path: Path) -> Path:
    ids = _tokenizer(path)
    _images(path, "ChineseCLIPImageProcessor")
    text = {**SMALL, **ids}
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return randomized(ChineseCLIPModel(config), path)


def make_align(path: Path) -> Path:
    ids = _tokenizer(path)
    _images(path, "EfficientNetImageProcessor")
    text = {**SMALL, **ids}
    vision = {
        "image_size": SIDE,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 32,
        "depth_divisor": 8,
    }
    return randomized(
        AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=32, temperature_init_value=0.1)),
        path,
    )


TOWERS: dict[str, Callable[[Path], Path]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "siglip2": make_siglip2,
    "chinese_clip": make_chinese_clip,
    "align": make_align,
}
