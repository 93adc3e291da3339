"""The models that are trained: Qwen2.5-VL in several sizes, random weights, around the tiny model's tokenizer.

Small ones are saved and loaded as any model is. The others are made from their config on the device whenever they are
needed: the same seed gives the same weights there, and nothing is fetched or written.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data_samples" / "tiny-vlm"
PATCH = 14
_SMALL_VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_heads": 4,
    "fullatt_block_indexes": [1, 3],
}


@dataclass(frozen=True)
class Shape:
    """A size of model, and what it is trained on where nothing else is asked for."""

    text: dict[str, Any]
    vision: dict[str, Any]
    built: bool = False
    """Made on the device from its config, never saved."""
    photos: bool = False
    """Images are 4:3 or 3:4 with a longer side of `sides`; otherwise each side is one of `sides` by itself."""
    sides: tuple[int, int] = (84, 448)
    """Pixels, the least and the most."""
    batch_size: int = 8
    dtype: str = "float32"


def _text(vocabulary: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    return {**sizes, **heads, "rope_parameters": rope}


SHAPES = {
    "small-vocabulary": Shape(_text(32_000, 512, 8, 1408), _SMALL_VISION),
    "large-vocabulary": Shape(_text(151_936, 256, 4, 704), _SMALL_VISION),
    "qwen2.5-vl-tiny": Shape(
        {**_text(32_000, 256, 4, 704), "tie_word_embeddings": False},
        _SMALL_VISION,
        built=True,
        photos=True,
        sides=(280, 560),
        batch_size=2,
    ),
    "qwen2.5-vl-7b": Shape(
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "intermediate_size": 18_944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128_000,
            "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "initializer_range": 0.02,
        },
        built=True,
        photos=True,
        sides=(640, 1280),
        batch_size=2,
        dtype="bfloat16",
    ),
}


def make_model(shape: str, folder: Path) -> Path:
    """A model directory of that shape; without weights where they are made on the device."""
    wanted, path = SHAPES[shape], folder / f"model-{shape}"
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(TINY / name, path / name)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    least, most = 56 * 56, 12_845_056
    processor |= {"patch_size": PATCH, "min_pixels": least, "max_pixels": most}
    processor["size"] = {"shortest_edge": least, "longest_edge": most}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Qwen2_5_VLConfig.from_pretrained(TINY)
    text, vision = config.text_config, config.vision_config
    for part, values in ((text, wanted.text), (vision, wanted.vision)):
        for key, value in values.items():
            setattr(part, key, value)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.tie_word_embeddings = text.tie_word_embeddings
    vision.patch_size, vision.out_hidden_size, vision.window_size = PATCH, text.hidden_size, 112
    config.save_pretrained(path)
    if not wanted.built and not (path / "model.safetensors").exists():
        build_model(path, "float32", "cpu", seed=0).save_pretrained(path)
    return path


def build_model(path: str | Path, dtype: str, device: str, seed: int) -> Any:
    """The model of that directory's config with random weights, made on `device` in `dtype`.

    A seed gives the same weights on the same kind of device, and leaves the generator in the same state.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.name_or_path = str(path)
    torch.manual_seed(seed)
    return model
