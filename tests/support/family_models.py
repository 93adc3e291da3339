"""Tiny model directories of many families: the real config, model and processor classes, small sizes, random weights.

In a config `id:<token>` stands for the id of a token, `vocabulary` for the number of tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from support.builders import randomized
from support.label_models import _CORPUS, _byte_fallback, _trained, byte_level, byte_level_split

SIDE, PATCH = 28, 7
"""Of the image or tile and of a patch, in pixels, where the family has a fixed size: 4 x 4 patches."""
TEXT: dict[str, Any] = {
    "vocab_size": "vocabulary",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TILES = {"size": {"height": SIDE, "width": SIDE}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
SPLIT: dict[str, Any] = {"tokenizer": byte_level_split}
COHERE: dict[str, Any] = SPLIT | {
    "tokenizer_class": "CohereTokenizer",
    "tokens": "<PAD> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> "
    "<|IMG_LINE_BREAK|> TILE_GLOBAL TILE_1 TILE_2 TILE_3 TILE_4",
    "bos": "<BOS_TOKEN>",
    "eos": "<|END_OF_TURN_TOKEN|>",
    "pad": "<PAD>",
    "bos_in_front": True,
}
LFM2 = TEXT | {"layer_types": ["conv", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """What one family's directory is made of.

    `names`: the special tokens that the tokenizer names. `stops`: tokens that end generation besides `eos`.
    `needs`: the packages that have to be installed besides mmtrain's own requirements for the family to load.
    """

    template: str
    tokens: str
    config: dict[str, Any]
    tokenizer: Callable[[], Tokenizer] = byte_level
    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos: str | None = None
    eos: str = "<|im_end|>"
    pad: str = "<|endoftext|>"
    stops: tuple[str, ...] = ()
    bos_in_front: bool = False
    names: dict[str, str] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    strings: str = ""
    """Roles whose content the template takes as a string only."""
    unended: str = ""
    """The replies after which the template writes no token that ends a turn: "each" or "last"."""
    needs: str = ""
    given_template: bool = False
    """The directory has no template: it is given as `model.chat_template`."""
    marks_replies: bool = False
    """The tokens of a reply have the type 1, those of its prompt 0."""


def gemma_tokenizer() -> Tokenizer:
    """SentencePiece as Gemma has it: no space before a text, runs of newlines are one token."""
    newlines = ["\n" * count for count in range(2, 5)] * 9
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = _byte_fallback(*_trained(split, [text.replace(" ", "▁") for text in _CORPUS] + newlines))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_family(family: Family, path: Path) -> Path:
    """A directory of the family in `path`: tokenizer, template, processor, and the model's weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_processor(family, path)
    config = _filled(family.config, tokenizer)
    named = {"bos_token_id": family.bos, "eos_token_id": family.eos, "pad_token_id": family.pad}
    text = config.get("text_config", config)
    text |= {key: None if token is None else tokenizer.token_to_id(token) for key, token in named.items()}
    model_class = AutoModelForMultimodalLM if family.images else AutoModelForCausalLM
    randomized(model_class.from_config(AutoConfig.for_model(**config)), path)
    stops = [tokenizer.token_to_id(token) for token in (family.eos, *family.stops)]
    _write(path / "generation_config.json", {"eos_token_id": stops})
    return path


def _write_processor(family: Family, path: Path) -> Tokenizer:
    tokenizer = family.tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in family.tokens.split()])
    if family.bos_in_front:
        assert family.bos is not None
        pair = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[pair])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": family.tokenizer_class,
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": family.names,
    }
    _write(path / "tokenizer_config.json", settings)
    name = "given.jinja" if family.given_template else "chat_template.jinja"
    (path / name).write_text(family.template, encoding="utf-8")
    if family.images:
        _write(path / "preprocessor_config.json", family.images)
        _write(path / "processor_config.json", family.processor)
    return tokenizer


def _filled(value: Any, tokenizer: Tokenizer) -> Any:
    """`value` with the tokens' ids in place of their names."""
    if isinstance(value, dict):
        return {key: _filled(one, tokenizer) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, tokenizer) for one in value]
    if value == "vocabulary":
        return tokenizer.get_vocab_size() + 16  # classes of tokenizers and processors add tokens
    if isinstance(value, str) and value.startswith("id:"):
        return tokenizer.token_to_id(value.removeprefix("id:"))
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
