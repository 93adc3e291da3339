"""Tiny model directories of many families: the real config, model and processor classes, small sizes, random weights.

In a config `id:<token>` stands for the id of a token, `vocabulary` for the number of tokens.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import family_templates as templates
from builders import _random
from label_models import byte_level, byte_level_split, legacy, metaspace_first
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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


@dataclass(frozen=True)
class Family:
    """What one family's directory is made of.

    `names`: the special tokens that the tokenizer names. `stops`: tokens that end generation besides `eos`.
    `needs`: what has to be installed besides mmtrain's own requirements, for the family's processor to load.
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
    own_end: bool = True
    """The template writes a token that ends each reply."""
    needs: str | None = None


_CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
_QWEN = f"{_CHATML} <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
_QWEN_IDS = {
    "image_token_id": "id:<|image_pad|>",
    "video_token_id": "id:<|video_pad|>",
    "vision_start_token_id": "id:<|vision_start|>",
    "vision_end_token_id": "id:<|vision_end|>",
}
_QWEN_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2} | {
    "size": {"shortest_edge": 1024, "longest_edge": 65536}
}
_SPLIT = {"tokenizer": byte_level_split}
_COHERE: dict[str, Any] = _SPLIT | {
    "tokens": "<PAD> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> "
    "<|IMG_LINE_BREAK|>",
    "bos": "<BOS_TOKEN>",
    "eos": "<|END_OF_TURN_TOKEN|>",
    "pad": "<PAD>",
    "bos_in_front": True,
}
_MISTRAL: dict[str, Any] = _SPLIT | {
    "tokens": "<unk> <s> </s> [INST] [/INST] [IMG] <pad> [IMG_BREAK] [IMG_END] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "bos_in_front": True,
}
_LLAMA2: dict[str, Any] = {
    "tokens": "<unk> <s> </s> <image> <pad>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "bos_in_front": True,
    "names": {"image_token": "<image>"},
}
_IDEFICS = "<|begin_of_text|> <|end_of_text|> <|im_start|> <|im_end|> <fake_token_around_image> <image> <end_of_utterance> <global-img> " + " ".join(
    f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)
)
_PIXTRAL_VISION = VISION | {"model_type": "pixtral", "image_size": 64, "patch_size": 8}

FAMILIES = {
    "qwen2_vl": Family(
        templates.QWEN2_VL,
        _QWEN,
        _QWEN_IDS
        | {
            "model_type": "qwen2_vl",
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        },
        images=_QWEN_IMAGES,
        processor={"processor_class": "Qwen2VLProcessor"},
    ),
    "qwen2_5_vl": Family(
        templates.QWEN2_VL,
        _QWEN,
        _QWEN_IDS
        | {
            "model_type": "qwen2_5_vl",
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 32},
        },
        images=_QWEN_IMAGES,
        processor={"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen3_vl": Family(
        templates.QWEN3_VL,
        _QWEN,
        _QWEN_IDS
        | {
            "model_type": "qwen3_vl",
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        },
        images=_QWEN_IMAGES,
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "gemma3": Family(
        templates.GEMMA3,
        "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>",
        {
            "model_type": "gemma3",
            "text_config": TEXT | {"layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": "id:<start_of_image>",
            "eoi_token_index": "id:<end_of_image>",
            "image_token_index": "id:<image_soft_token>",
        },
        tokenizer=metaspace_first,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        stops=("<end_of_turn>",),
        bos_in_front=True,
        names={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        images={"image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}},
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "gemma4": Family(
        templates.GEMMA4,
        "<pad> <eos> <bos> <unk> <|turn> <turn|> <|image> <|image|> <image|> <|audio> <|audio|> <audio|> <|video|>",
        {
            "model_type": "gemma4",
            "text_config": TEXT
            | {
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": "vocabulary",
                "global_head_dim": 16,
            },
            "vision_config": VISION
            | {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 128,
            },
            "boi_token_id": "id:<|image>",
            "eoi_token_id": "id:<image|>",
            "image_token_id": "id:<|image|>",
            "video_token_id": "id:<|video|>",
            "audio_token_id": "id:<|audio|>",
            "boa_token_id": "id:<|audio>",
            "eoa_token_index": "id:<audio|>",
        },
        tokenizer=metaspace_first,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        stops=("<turn|>",),
        bos_in_front=True,
        names={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        images={
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 8,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 2,
        },
        processor={"processor_class": "Gemma4Processor", "image_seq_length": 70},
    ),
    "aya_vision": Family(
        templates.AYA_VISION,
        config={
            "model_type": "aya_vision",
            "text_config": TEXT | {"model_type": "cohere2"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "downsample_factor": 2,
            "image_token_index": "id:<|IMG_PATCH|>",
        },
        images={"image_processor_type": "GotOcr2ImageProcessor"} | TILES,
        processor={"processor_class": "AyaVisionProcessor"}
        | {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
        **_COHERE,
    ),
    "cohere2": Family(templates.COHERE2, config=TEXT | {"model_type": "cohere2"}, strings="all", **_COHERE),
    "cohere2_vision": Family(
        templates.COHERE2_VISION,
        config={
            "model_type": "cohere2_vision",
            "text_config": TEXT | {"model_type": "cohere2"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
            "image_token_id": "id:<|IMG_PATCH|>",
        },
        names={
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        images={"image_processor_type": "Cohere2VisionImageProcessor", "patch_size": 2} | TILES,
        processor={"processor_class": "Cohere2VisionProcessor"},
        needs="torchvision",
        **_COHERE,
    ),
    "idefics3": Family(
        templates.IDEFICS3,
        _IDEFICS,
        {
            "model_type": "idefics3",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": "id:<image>",
        },
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        pad="<|end_of_text|>",
        bos_in_front=True,
        images={
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": SIDE},
        },
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
        **_SPLIT,
    ),
    "smolvlm": Family(
        templates.SMOLVLM,
        _IDEFICS,
        {
            "model_type": "smolvlm",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": "id:<image>",
        },
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        images={
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": SIDE},
        },
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        needs="num2words",
    ),
}


def make_family(name: str, path: Path) -> Path:
    """A directory of the family in `path`: tokenizer, template, processor, and the model's weights."""
    family = FAMILIES[name]
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_processor(family, path)
    config = _filled(family.config, tokenizer)
    named = {"bos_token_id": family.bos, "eos_token_id": family.eos, "pad_token_id": family.pad}
    text = config.get("text_config", config)
    text |= {key: None if token is None else tokenizer.token_to_id(token) for key, token in named.items()}
    model_class = AutoModelForImageTextToText if family.images else AutoModelForCausalLM
    _random(model_class.from_config(AutoConfig.for_model(**config)), path)
    stops = [tokenizer.token_to_id(token) for token in (family.eos, *family.stops)]
    _write(path / "generation_config.json", {"eos_token_id": stops})
    return path


def _write_processor(family: Family, path: Path) -> Tokenizer:
    tokenizer = family.tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in family.tokens.split()])
    if family.bos_in_front:
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
    (path / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    if family.images:
        _write(path / "preprocessor_config.json", family.images)
        _write(path / "processor_config.json", family.processor)
    return tokenizer


def _filled(value: Any, tokenizer: Tokenizer) -> Any:
    """`value` with the tokens' ids in place of their names."""
    if isinstance(value, dict):
        return {key: _filled(one, tokenizer) for key, one in value.items()}
    if value == "vocabulary":
        return tokenizer.get_vocab_size()
    if isinstance(value, str) and value.startswith("id:"):
        return tokenizer.token_to_id(value.removeprefix("id:"))
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
