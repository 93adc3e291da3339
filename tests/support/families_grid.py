"""Families whose placeholders follow the image's own grid of patches."""

from typing import Any

from support import family_templates as templates
from support.family_models import CHATML, LFM2, MROPE, QWEN_VISION, SPLIT, TEXT, VISION, Family, gemma_tokenizer

_QWEN = f"{CHATML} <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
_QWEN_IDS = {
    "image_token_id": "id:<|image_pad|>",
    "video_token_id": "id:<|video_pad|>",
    "vision_start_token_id": "id:<|vision_start|>",
    "vision_end_token_id": "id:<|vision_end|>",
}
_QWEN_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2} | {
    "size": {"shortest_edge": 1024, "longest_edge": 65536}
}
_MISTRAL: dict[str, Any] = SPLIT | {
    "tokens": "<unk> <s> </s> [INST] [/INST] [IMG] <pad> [IMG_BREAK] [IMG_END] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "bos_in_front": True,
}
_PIXTRAL_VISION = VISION | {"model_type": "pixtral", "image_size": 64, "patch_size": 8}
_PIXTRAL_IMAGES = {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 8, "width": 8}} | {
    "size": {"longest_edge": 64}
}

GRID = {
    "qwen2_vl": Family(
        templates.QWEN2_VL,
        _QWEN,
        _QWEN_IDS
        | {
            "model_type": "qwen2_vl",
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        },
        tokenizer_class="Qwen2Tokenizer",
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
        tokenizer_class="Qwen2Tokenizer",
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
        tokenizer_class="Qwen2Tokenizer",
        images=_QWEN_IMAGES,
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "qwen3_5": Family(
        templates.QWEN3_5,
        f"{_QWEN} <think> </think>",
        _QWEN_IDS
        | {
            "model_type": "qwen3_5",
            "text_config": TEXT
            | {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
            },
            "vision_config": QWEN_VISION | {"num_position_embeddings": 64},
        },
        tokenizer_class="Qwen2Tokenizer",
        images=_QWEN_IMAGES,
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "glm4v": Family(
        templates.GLM4V,
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|begin_of_image|> <|image|> "
        "<|end_of_image|> <|begin_of_video|> <|video|> <|end_of_video|>",
        {
            "model_type": "glm4v",
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"image_size": 64},
            "image_token_id": "id:<|image|>",
            "video_token_id": "id:<|video|>",
            "image_start_token_id": "id:<|begin_of_image|>",
            "image_end_token_id": "id:<|end_of_image|>",
            "video_start_token_id": "id:<|begin_of_video|>",
            "video_end_token_id": "id:<|end_of_video|>",
        },
        eos="<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
        images=_QWEN_IMAGES | {"image_processor_type": "Glm4vImageProcessor"},
        processor={"processor_class": "Glm4vProcessor"},
        strings="system assistant",
        unended="last",
        **SPLIT,
    ),
    "hunyuan_vl": Family(
        templates.HUNYUAN_VL,
        "<｜hy_begin▁of▁sentence｜> <｜hy_end▁of▁sentence｜> <｜hy_▁pad▁｜> <｜hy_User｜> <｜hy_Assistant｜> "
        "<｜hy_place▁holder▁no▁3｜> <｜hy_place▁holder▁no▁100｜> <｜hy_place▁holder▁no▁101｜> "
        "<｜hy_place▁holder▁no▁102｜>",
        {
            "model_type": "hunyuan_vl",
            "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}},
            "vision_config": VISION
            | {"patch_size": 8, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 128}
            | {"max_vit_seq_len": 256},
            "image_token_id": "id:<｜hy_place▁holder▁no▁102｜>",
            "im_start_id": "id:<｜hy_place▁holder▁no▁100｜>",
            "im_end_id": "id:<｜hy_place▁holder▁no▁101｜>",
        },
        bos="<｜hy_begin▁of▁sentence｜>",
        eos="<｜hy_Assistant｜>",
        pad="<｜hy_▁pad▁｜>",
        names={
            "image_token": "<｜hy_place▁holder▁no▁102｜>",
            "image_start_token": "<｜hy_place▁holder▁no▁100｜>",
            "image_end_token": "<｜hy_place▁holder▁no▁101｜>",
        },
        images={"image_processor_type": "HunYuanVLImageProcessor", "patch_size": 8}
        | {"size": {"shortest_edge": 1024, "longest_edge": 65536}},
        processor={"processor_class": "HunYuanVLProcessor"},
        **SPLIT,
    ),
    "minicpmv4_6": Family(
        templates.MINICPM,
        f"{CHATML} <|image_pad|> <|video_pad|> <image> </image> <slice> </slice> <image_id> </image_id>",
        {
            "model_type": "minicpmv4_6",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": 64, "patch_size": 8},
            "insert_layer_id": 0,
            "image_token_id": "id:<|image_pad|>",
            "video_token_id": "id:<|video_pad|>",
        },
        names={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        tokenizer_class="Qwen2Tokenizer",
        images={"image_processor_type": "MiniCPMV4_6ImageProcessor", "patch_size": 8, "scale_resolution": 64},
        processor={"processor_class": "MiniCPMV4_6Processor"},
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
                "global_head_dim": 32,
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
        tokenizer=gemma_tokenizer,
        tokenizer_class="GemmaTokenizer",
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
    "pixtral": Family(
        templates.PIXTRAL,
        config={
            "model_type": "llava",
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": _PIXTRAL_VISION,
            "image_token_index": "id:[IMG]",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        images=_PIXTRAL_IMAGES,
        processor={"processor_class": "PixtralProcessor", "patch_size": 8},
        needs="torchvision",
        **_MISTRAL,
    ),
    "mistral3": Family(
        templates.MISTRAL3,
        config={
            "model_type": "mistral3",
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": _PIXTRAL_VISION,
            "image_token_index": "id:[IMG]",
        },
        images=_PIXTRAL_IMAGES,
        processor={"processor_class": "PixtralProcessor", "patch_size": 8, "spatial_merge_size": 2},
        needs="torchvision",
        **_MISTRAL,
    ),
    "lfm2_vl": Family(
        templates.LFM2_VL,
        f"<|pad|> <|startoftext|> {CHATML} <image> <|image_start|> <|image_end|> <|img_thumbnail|>",
        {
            "model_type": "lfm2_vl",
            "text_config": LFM2 | {"model_type": "lfm2"},
            "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 8},
            "image_token_id": "id:<image>",
        },
        bos="<|startoftext|>",
        pad="<|pad|>",
        bos_in_front=True,
        images={"image_processor_type": "Lfm2VlImageProcessor", "encoder_patch_size": 8, "tile_size": 32}
        | {"min_image_tokens": 4, "max_image_tokens": 16, "max_tiles": 4},
        processor={"processor_class": "Lfm2VlProcessor"},
        needs="torchvision",
    ),
}
