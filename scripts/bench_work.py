"""What scripts/bench trains: a Qwen2.5-VL of random weights and chats over drawn pictures, the same every time."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data_samples" / "tiny-vlm"
SHAPES: dict[str, dict[str, Any]] = {
    "small-vocabulary": {"vocab_size": 32_000, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "large-vocabulary": {"vocab_size": 151_936, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704},
}
TEXT = """
the picture shows a small figure near the left border and a larger one that covers part of it while the ground behind
them stays even so that every outline is easy to follow from here to there and back again
"""
WORDS = TEXT.split()
PATCH = 14


def make_model(shape: str, folder: Path) -> Path:
    """The tiny model's tokenizer and template around random weights of a larger shape."""
    path = folder / f"model-{shape}"
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(TINY / name, path / name)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    processor |= {"patch_size": PATCH, "min_pixels": 56 * 56, "max_pixels": 1024 * 1024}
    processor["size"] = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Qwen2_5_VLConfig.from_pretrained(TINY)
    text, vision = config.text_config, config.vision_config
    for key, value in SHAPES[shape].items():
        setattr(text, key, value)
    text.num_attention_heads, text.num_key_value_heads = text.hidden_size // 64, 2
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text.max_position_embeddings = 8192
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 4, 128, 344, 4
    vision.patch_size, vision.out_hidden_size, vision.window_size = PATCH, text.hidden_size, 112
    vision.fullatt_block_indexes = [1, 3]
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    return path


def make_data(folder: Path, num_samples: int = 128) -> Path:
    """Chats with no, one or two pictures of 84 to 448 pixels a side, and answers of 5 to 160 words."""
    path = folder / "chats.jsonl"
    rng = random.Random(7)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_samples):
        names = [f"pictures/{number}-{n}.png" for n in range(rng.choice((0, 1, 1, 1, 2)))]
        for name in names:
            _draw(rng).save(folder / name)
        messages = []
        for turn in range(rng.choice((1, 1, 2))):
            question = " ".join(rng.choices(WORDS, k=rng.randint(4, 16)))
            messages.append({"role": "user", "content": "<image>" * len(names) * (turn == 0) + question})
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(5, 160)))})
        rows.append({"messages": messages, "images": names})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _draw(rng: random.Random) -> PIL.Image.Image:
    size = (rng.randint(84, 448), rng.randint(84, 448))
    picture = PIL.Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    pen = PIL.ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 5)):
        x, y, side = rng.randrange(size[0]), rng.randrange(size[1]), rng.randint(10, 120)
        pen.ellipse((x, y, x + side, y + side), tuple(rng.randrange(256) for _ in range(3)))
    return picture
