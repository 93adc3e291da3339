"""Further families of image-text models, most of them with the processor of another family."""

from typing import Any

from support import family_templates as templates
from support.families_grid import _PIXTRAL_IMAGES, _PIXTRAL_VISION, _QWEN, _QWEN_IDS, _QWEN_IMAGES, GRID
from support.families_more import _EXPERTS, _GLM, _like
from support.families_tile import _CLIP, _CLIP_LAYOUT, _SIGLIP, TILE
from support.family_models import LFM2, MROPE, QWEN_VISION, TEXT, VISION, Family

_GEMMA3 = TILE["gemma3"]
_QWEN2 = GRID["qwen2_vl"]
_QWEN35 = GRID["qwen3_5"]
_LLAVA, _NEXT = TILE["llava"], TILE["llava_next"]
_MROPE_TEXT = TEXT | {"rope_parameters": MROPE}
_WINDOWS = QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 32}
_OMNI: dict[str, Any] = {
    "tokens": f"{_QWEN} <|AUDIO|> <|audio_bos|> <|audio_eos|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "names": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
}
_OMNI_CONFIG: dict[str, Any] = {
    **{f"{kind}_token_{end}": f"id:<|{kind}_pad|>" for kind in ("image", "video") for end in ("id", "index")},
    **{f"audio_token_{end}": "id:<|AUDIO|>" for end in ("id", "index")},
    "vision_start_token_id": "id:<|vision_start|>",
    "vision_end_token_id": "id:<|vision_end|>",
    "audio_start_token_id": "id:<|audio_bos|>",
    "audio_end_token_id": "id:<|audio_eos|>",
    "audio_config": {
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "output_dim": 32,
        "n_window": 10,
        "max_source_positions": 100,
        "downsample_hidden_size": 8,
    },
}


def _qwen(model_type: str, processor_class: str, **config: Any) -> Family:
    """A family with the tokens and the image processor of Qwen2-VL."""
    return _like(
        _QWEN2, config=_QWEN_IDS | {"model_type": model_type} | config, processor={"processor_class": processor_class}
    )


OTHER = {
    "vipllava": _like(_LLAVA, config=_LLAVA.config | {"model_type": "vipllava", "vision_feature_layer": [-2, -1]}),
    "video_llava": _like(
        _LLAVA,
        config={
            "model_type": "video_llava",
            "image_token_index": "id:<image>",
            "video_token_index": "id:<pad>",
            "image_seq_length": 16,
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": _CLIP,
        },
        images=_LLAVA.images | {"image_processor_type": "VideoLlavaImageProcessor"},
        processor={"processor_class": "VideoLlavaProcessor"} | _CLIP_LAYOUT,
    ),
    "llava_next_video": _like(
        _NEXT,
        config=_NEXT.config | {"model_type": "llava_next_video", "video_token_index": "id:<pad>"},
        processor={"processor_class": "LlavaNextVideoProcessor"} | _CLIP_LAYOUT,
    ),
    "granite4_vision": _like(
        _NEXT,
        config=_NEXT.config
        | {
            "model_type": "granite4_vision",
            "vision_config": _SIGLIP | {"hidden_size": 64},
            "text_config": TEXT,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
            "qformer_config": {"num_hidden_layers": 1, "intermediate_size": 64},
            "deepstack_layer_map": [[-1, 0]],
        },
        processor={
            "processor_class": "Granite4VisionProcessor",
            "patch_size": 7,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
        },
    ),
    "qwen3_5_moe": _like(
        _QWEN35,
        config=_QWEN35.config
        | {
            "model_type": "qwen3_5_moe",
            "text_config": _QWEN35.config["text_config"] | _EXPERTS | {"shared_expert_intermediate_size": 32},
        },
    ),
    "qwen2_5_omni_thinker": _like(
        _QWEN2,
        config=_OMNI_CONFIG
        | {"model_type": "qwen2_5_omni_thinker", "text_config": _MROPE_TEXT, "vision_config": _WINDOWS},
        processor={"processor_class": "Qwen2_5OmniProcessor"},
        **_OMNI,
    ),
    "qwen3_omni_moe_thinker": _like(
        _QWEN2,
        config=_OMNI_CONFIG
        | {
            "model_type": "qwen3_omni_moe_thinker",
            "text_config": _MROPE_TEXT | _EXPERTS,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        },
        processor={"processor_class": "Qwen3OmniMoeProcessor"},
        **_OMNI,
    ),
    "glm_ocr": _like(
        _GLM,
        config=_GLM.config | {"model_type": "glm_ocr"},
        images=_GLM.images | {"image_processor_type": "Glm46VImageProcessor"},
        processor={"processor_class": "Glm46VProcessor"},
    ),
    "video_llama_3": _like(
        _qwen(
            "video_llama_3",
            "VideoLlama3Processor",
            text_config=TEXT | {"model_type": "qwen2"},
            vision_config=VISION | {"patch_size": 8},
        ),
        images={"image_processor_type": "VideoLlama3ImageProcessor", "patch_size": 8, "merge_size": 1}
        | {"size": {"shortest_edge": 1024, "longest_edge": 8192}},
    ),
    "paddleocr_vl": _like(
        _qwen(
            "paddleocr_vl",
            "PaddleOCRVLProcessor",
            text_config=_MROPE_TEXT,
            vision_config=VISION | {"patch_size": 8, "image_size": 64},
        ),
        names={"image_token": "<|image_pad|>"},
        images=_QWEN_IMAGES | {"image_processor_type": "PaddleOCRVLImageProcessor"},
    ),
    "exaone4_5": _qwen(
        "exaone4_5",
        "Exaone4_5_Processor",
        text_config=_MROPE_TEXT | {"model_type": "exaone4"},
        vision_config=_WINDOWS | {"num_key_value_heads": 1},
    ),
    "hyperclovax_vision_v2": _qwen(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2Processor",
        text_config=TEXT | {"model_type": "hyperclovax"},
        vision_config=_WINDOWS | {"model_type": "qwen2_5_vl_vision"},
    ),
    "lfm3_vl": _qwen(
        "lfm3_vl",
        "Lfm3VlProcessor",
        text_config=LFM2 | {"model_type": "lfm2"},
        vision_config=VISION | {"patch_size": 8, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "ernie4_5_vl_moe": _like(
        _QWEN2,
        tokens=f"{_QWEN} <|video_start|> <|video_end|>",
        tokenizer_class="PreTrainedTokenizerFast",
        config={
            "model_type": "ernie4_5_vl_moe",
            "image_token_id": "id:<|image_pad|>",
            "video_token_id": "id:<|video_pad|>",
            "image_start_token_id": "id:<|vision_start|>",
            "image_end_token_id": "id:<|vision_end|>",
            "video_start_token_id": "id:<|video_start|>",
            "video_end_token_id": "id:<|video_end|>",
            "text_config": TEXT
            | {
                "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]},
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "moe_intermediate_size": [32, 16],
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 64},
        },
        names={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<|vision_start|>",
            "image_end_token": "<|vision_end|>",
            "video_start_token": "<|video_start|>",
            "video_end_token": "<|video_end|>",
        },
        images=_QWEN_IMAGES | {"image_processor_type": "Ernie4_5_VLMoeImageProcessor"},
        processor={"processor_class": "Ernie4_5_VLMoeProcessor"},
    ),
    "lighton_ocr": Family(
        templates.QWEN3_VL,
        _QWEN,
        {
            "model_type": "lighton_ocr",
            "text_config": TEXT | {"model_type": "qwen3"},
            "vision_config": _PIXTRAL_VISION,
            "image_token_id": "id:<|image_pad|>",
        },
        names={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_end|>",
            "image_end_token": "<|vision_start|>",
        },
        images=_PIXTRAL_IMAGES,
        processor={"processor_class": "LightOnOcrProcessor", "patch_size": 8, "spatial_merge_size": 2},
    ),
    "gemma3n": _like(
        _GEMMA3,
        template=_GEMMA3.template.replace("<start_of_image>", "<image_soft_token>"),
        tokens=f"{_GEMMA3.tokens} <audio_soft_token> <start_of_audio> <end_of_audio>",
        config={
            "model_type": "gemma3n",
            "text_config": TEXT
            | {
                "vocab_size_per_layer_input": "vocabulary",
                "hidden_size_per_layer_input": 8,
                "activation_sparsity_pattern": None,
                "laurel_rank": 4,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
            },
            "vision_config": {
                "architecture": "mobilenetv5_300m_enc",
                "model_args": {"channel_multiplier": 0.05},
                "vocab_size": 16,
                "vocab_offset": "vocabulary",
            },
            "audio_config": {
                "hidden_size": 32,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [8, 4],
                "vocab_size": 16,
                "vocab_offset": "vocabulary",
            },
            "image_token_id": "id:<image_soft_token>",
            "audio_token_id": "id:<audio_soft_token>",
            "boi_token_id": "id:<start_of_image>",
            "eoi_token_id": "id:<end_of_image>",
            "boa_token_id": "id:<start_of_audio>",
            "eoa_token_id": "id:<end_of_audio>",
        },
        names=_GEMMA3.names
        | {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"},
        images={"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}}
        | {"do_normalize": False},
        processor={"processor_class": "Gemma3nProcessor", "image_seq_length": 256},
        needs="torchvision timm",
    ),
}
