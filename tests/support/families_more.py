"""More families of image-text models: experts, resamplers, parts for sound and for making images, towers of timm."""

from typing import Any

from support import family_templates as templates
from support.families_grid import GRID
from support.family_models import CHATML, MROPE, PATCH, SIDE, SPLIT, TEXT, TILES, VISION, Family, gemma_tokenizer

_SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_QWEN3 = GRID["qwen3_vl"]
_GLM = GRID["glm4v"]
_SQUARE = {"height": SIDE, "width": SIDE}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_LATENT = _ROUTED | {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
}


def _like(family: Family, **changes: Any) -> Family:
    """Another family with the same processor."""
    fields = {name: getattr(family, name) for name in Family.__dataclass_fields__}
    return Family(**fields | changes)


MORE = {
    "qwen3_vl_moe": _like(
        _QWEN3,
        config=_QWEN3.config
        | {"model_type": "qwen3_vl_moe", "text_config": TEXT | _EXPERTS | {"rope_parameters": MROPE}},
    ),
    "glm4v_moe": _like(
        _GLM,
        config=_GLM.config
        | {
            "model_type": "glm4v_moe",
            "text_config": TEXT
            | _ROUTED
            | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}, "first_k_dense_replace": 1},
        },
    ),
    "glm46v": _like(
        _GLM,
        config=_GLM.config | {"model_type": "glm46v"},
        images=_GLM.images | {"image_processor_type": "Glm46VImageProcessor"},
        processor={"processor_class": "Glm46VProcessor"},
    ),
    "paligemma2": Family(
        templates.PALIGEMMA,
        "<pad> <eos> <bos> <unk> <image>",
        {
            "model_type": "paligemma",
            # its processor adds 1,152 tokens for places and outlines
            "text_config": TEXT
            | {"model_type": "gemma2", "vocab_size": 2048, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": _SIGLIP,
            "projection_dim": 32,
            "hidden_size": 32,
            "image_token_index": "id:<image>",
        },
        tokenizer=gemma_tokenizer,
        tokenizer_class="GemmaTokenizer",
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        names={"image_token": "<image>"},
        images={"image_processor_type": "SiglipImageProcessor", "size": _SQUARE, "image_seq_length": 16},
        processor={"processor_class": "PaliGemmaProcessor"},
        given_template=True,
        marks_replies=True,
    ),
    "deepseek_vl": Family(
        templates.INTERNVL.replace("<IMG_CONTEXT>", "<image_placeholder>"),
        f"{CHATML} <image_placeholder>",
        {
            "model_type": "deepseek_vl",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": _SIGLIP,
            "image_token_id": "id:<image_placeholder>",
        },
        names={"image_token": "<image_placeholder>"},
        images={"image_processor_type": "DeepseekVLImageProcessor", "size": _SQUARE},
        processor={"processor_class": "DeepseekVLProcessor", "num_image_tokens": 16},
    ),
    "deepseek_vl_hybrid": Family(
        templates.INTERNVL.replace("<IMG_CONTEXT>", "<image_placeholder>"),
        f"{CHATML} <image_placeholder>",
        {
            "model_type": "deepseek_vl_hybrid",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": _SIGLIP,
            "high_res_vision_config": {
                "model_type": "sam_vision_model",
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 4 * SIDE,
                "patch_size": PATCH,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 64,
            },
            "image_token_id": "id:<image_placeholder>",
        },
        names={"image_token": "<image_placeholder>"},
        images={"image_processor_type": "DeepseekVLHybridImageProcessor", "size": _SQUARE}
        | {"high_res_size": {"height": 4 * SIDE, "width": 4 * SIDE}},
        processor={"processor_class": "DeepseekVLHybridProcessor", "num_image_tokens": 16},
    ),
    "janus": Family(
        templates.INTERNVL.replace("<IMG_CONTEXT>", "<image_placeholder>"),
        f"{CHATML} <image_placeholder> <begin_of_image> <end_of_image>",
        {
            "model_type": "janus",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": PATCH,
                "mlp_ratio": 2,
                "projection_dim": 32,
                "num_image_tokens": 16,
            },
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "embed_dim": 8,
                "num_embeddings": 64,
                "latent_channels": 32,
                "num_patches": 4,
                "num_res_blocks": 1,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
            "image_token_id": "id:<image_placeholder>",
        },
        names={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        images={"image_processor_type": "JanusImageProcessor", "size": _SQUARE},
        processor={"processor_class": "JanusProcessor", "num_image_tokens": 16},
    ),
    "ovis2": Family(
        templates.INTERNVL.replace("<IMG_CONTEXT>", "<image>"),
        f"{CHATML} <image> <IMG_START> <IMG_ATOM> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>",
        {
            "model_type": "ovis2",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"vocab_size": 64, "hidden_stride": 1},
            "image_token_id": "id:<IMG_ATOM>",
            "visual_indicator_token_ids": [
                "id:<IMG_START>",
                "id:<IMG_GRID>",
                "id:<IMG_COL>",
                "id:<IMG_ROW>",
                "id:<IMG_END>",
            ],
            "vocab_size": "vocabulary",
            "hidden_size": 32,
        },
        images={"image_processor_type": "Ovis2ImageProcessor"} | TILES,
        processor={"processor_class": "Ovis2Processor", "image_seq_length": 16},
    ),
    "llama4": Family(
        templates.QWEN3_VL.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>"),
        f"{CHATML} <|image|> <|image_start|> <|image_end|> <|patch|> <|tile_x_separator|> <|tile_y_separator|>",
        {
            "model_type": "llama4",
            "text_config": TEXT
            | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64, "num_hidden_layers": 2}
            | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
            "vision_config": VISION
            | {
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
            },
            "image_token_index": "id:<|patch|>",
            "boi_token_index": "id:<|image_start|>",
            "eoi_token_index": "id:<|image_end|>",
        },
        images={"image_processor_type": "Llama4ImageProcessor", "size": _SQUARE, "max_patches": 4},
        processor={"processor_class": "Llama4Processor", "patch_size": PATCH},
        needs="torchvision",
        **SPLIT,
    ),
    "phi4_multimodal": Family(
        templates.QWEN3_VL.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>"),
        f"{CHATML} <|image|> <|audio|>",
        TEXT
        | {
            "model_type": "phi4_multimodal",
            "vision_config": VISION
            | {"image_size": 448, "patch_size": 14, "crop_size": 448, "image_token_id": "id:<|image|>"},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "audio_token_id": "id:<|audio|>",
            },
        },
        names={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        images={"image_processor_type": "Phi4MultimodalImageProcessor", "dynamic_hd": 1},
        processor={"processor_class": "Phi4MultimodalProcessor"},
        needs="torchvision",
    ),
    "kimi_k25": Family(
        templates.QWEN3_VL.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|media_begin|><|media_pad|><|media_end|>"
        ),
        f"{CHATML} <|media_begin|> <|media_pad|> <|media_end|> <|kimi_k25_video_placeholder|>",
        {
            "model_type": "kimi_k25",
            "text_config": TEXT | _LATENT | {"model_type": "deepseek_v3"},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 8,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
            },
            "projection_hidden_size": 32,
            "image_token_id": "id:<|media_pad|>",
            "video_token_id": "id:<|kimi_k25_video_placeholder|>",
            "vision_start_token_id": "id:<|media_begin|>",
            "vision_end_token_id": "id:<|media_end|>",
        },
        images={"image_processor_type": "Kimi_K25ImageProcessor", "patch_size": 8}
        | {"size": {"max_height": 16, "max_width": 16}},
        processor={"processor_class": "Kimi_K25Processor"},
        needs="torchvision",
    ),
    "perception_lm": Family(
        templates.INTERNVL.replace("<IMG_CONTEXT>", "<|image|>"),
        f"{CHATML} <|image|> <|video|>",
        {
            "model_type": "perception_lm",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": 64,
                    "img_size": [SIDE, SIDE],
                    "depth": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [2, 2],
                },
            },
            "image_token_id": "id:<|image|>",
            "video_token_id": "id:<|video|>",
        },
        names={"image_token": "<|image|>", "video_token": "<|video|>"},
        images={"image_processor_type": "PerceptionLMImageProcessor", "tile_size": SIDE, "max_num_tiles": 4}
        | {"size": _SQUARE},
        processor={"processor_class": "PerceptionLMProcessor", "patch_size": 14, "pooling_ratio": 1},
        needs="torchvision timm",
    ),
}
