"""Makes the tiny dual encoder of data_samples/tiny-clip, with random weights: CLIP's architecture in small sizes.

    python scripts/tiny_vlm/clip.py [TARGET]

Its tokenizer is the one of data_samples/tiny-vlm, with an end token after every text. Everything is seeded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors
from transformers import CLIPConfig, CLIPModel

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples"
BEGIN, END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
LENGTH = 32
SIDE = 64
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(target: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(SAMPLES / "tiny-vlm" / "tokenizer.json"))
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ids)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH}
    tokens = {"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING}
    write_json(target / "tokenizer_config.json", settings | tokens)
    return tokenizer


def make_model(target: Path, tokenizer: Tokenizer) -> None:
    names = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PADDING}
    text = {
        **SMALL,
        "num_hidden_layers": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": LENGTH,
        **{key: tokenizer.token_to_id(token) for key, token in names.items()},
    }
    vision = {**SMALL, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    size = {"height": SIDE, "width": SIDE}
    images = {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": {"shortest_edge": SIDE}}
    write_json(target / "preprocessor_config.json", images)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES / "tiny-clip"
    target.mkdir(parents=True, exist_ok=True)
    make_model(target, make_tokenizer(target))


if __name__ == "__main__":
    main()
