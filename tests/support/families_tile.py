"""Families that cut or resize an image to squares of a fixed size."""

from typing import Any

from support import family_templates as templates
from support.builders import LLAVA_TEMPLATE
from support.family_models import (
    CHATML,
    COHERE,
    PATCH,
    PINPOINTS,
    SIDE,
    SPLIT,
    TEXT,
    TILES,
    VISION,
    Family,
    gemma_tokenizer,
)
from support.label_models import legacy

_LLAMA2: dict[str, Any] = {
    "tokens": "<unk> <s> </s> <image> <pad>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "bos_in_front": True,
    "names": {"image_token": "<image>"},
}
_IDEFICS = (
    "<|begin_of_text|> <|end_of_text|> <|im_start|> <|im_end|> <fake_token_around_image> <image> <end_of_utterance> "
    "<global-img> <row_1_col_1> <row_1_col_2> <row_2_col_1> <row_2_col_2>"
)
_CLIP = VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32}
_CLIP_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIDE, "width": SIDE},
    "size": {"shortest_edge": SIDE},
}
_CLIP_LAYOUT = {
    "patch_size": PATCH,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
_SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
_LLAMA3_TURNS = "<|start_header_id|> <|end_header_id|> <|eot_id|>"

TILE = {
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
        tokenizer=gemma_tokenizer,
        tokenizer_class="GemmaTokenizer",
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
    "aya_vision": Family(
        templates.AYA_VISION,
        config={
            "model_type": "aya_vision",
            "text_config": TEXT | {"model_type": "cohere2"},
            "vision_config": _SIGLIP,
            "downsample_factor": 2,
            "image_token_index": "id:<|IMG_PATCH|>",
        },
        images={"image_processor_type": "GotOcr2ImageProcessor"} | TILES,
        processor={"processor_class": "AyaVisionProcessor"}
        | {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
        **COHERE,
    ),
    "cohere2_vision": Family(
        templates.COHERE2_VISION,
        config={
            "model_type": "cohere2_vision",
            "text_config": TEXT | {"model_type": "cohere2"},
            "vision_config": _SIGLIP,
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
        **COHERE,
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
        **SPLIT,
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
    "internvl": Family(
        templates.INTERNVL,
        f"{CHATML} <img> </img> <IMG_CONTEXT> <video>",
        {
            "model_type": "internvl",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            "image_token_id": "id:<IMG_CONTEXT>",
            "image_seq_length": 4,
        },
        names={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        tokenizer_class="Qwen2Tokenizer",
        images={"image_processor_type": "GotOcr2ImageProcessor"} | TILES,
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
    ),
    "llava": Family(
        LLAVA_TEMPLATE,
        config={"model_type": "llava", "image_token_index": "id:<image>", "image_seq_length": 16}
        | {"text_config": TEXT | {"model_type": "llama"}, "vision_config": _CLIP},
        tokenizer=legacy,
        images=_CLIP_IMAGES,
        processor={"processor_class": "LlavaProcessor"} | _CLIP_LAYOUT,
        unended="each",
        **_LLAMA2,
    ),
    "llava_next": Family(
        templates.LLAVA_NEXT,
        config={"model_type": "llava_next", "image_token_index": "id:<image>", "image_grid_pinpoints": PINPOINTS}
        | {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": _CLIP},
        tokenizer=legacy,
        images=_CLIP_IMAGES | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS},
        processor={"processor_class": "LlavaNextProcessor"} | _CLIP_LAYOUT,
        **_LLAMA2,
    ),
    "llava_onevision": Family(
        templates.LLAVA_ONEVISION,
        f"{CHATML} <image> <video>",
        {
            "model_type": "llava_onevision",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": _SIGLIP,
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": "id:<image>",
            "video_token_index": "id:<video>",
        },
        tokenizer_class="Qwen2Tokenizer",
        images={"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS}
        | {"size": {"height": SIDE, "width": SIDE}},
        processor={"processor_class": "LlavaOnevisionProcessor"}
        | {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "mllama": Family(
        templates.MLLAMA,
        f"<|begin_of_text|> <|end_of_text|> <|finetune_right_pad_id|> {_LLAMA3_TURNS} <|python_tag|> <|image|>",
        {
            "model_type": "mllama",
            "text_config": TEXT | {"vocab_size": "id:<|image|>", "num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": VISION
            | {
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            },
            "image_token_index": "id:<|image|>",
        },
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        bos_in_front=True,
        images={"image_processor_type": "MllamaImageProcessor", "size": {"height": SIDE, "width": SIDE}},
        processor={"processor_class": "MllamaProcessor"},
        strings="system",
        **SPLIT,
    ),
}
