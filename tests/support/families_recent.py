"""Families of the newest releases of transformers, and older ones with parts that no other family has."""

from typing import Any

from support import family_templates as templates
from support.families_grid import GRID
from support.families_more import _GLM, _LATENT, _like
from support.families_tile import _CLIP_IMAGES, TILE
from support.family_models import CHATML, TEXT, VISION, Family

_QWEN3, _LLAVA = GRID["qwen3_vl"], TILE["llava"]
_SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_ROPE_BY_KIND = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    }
}


def _placeholder(text: str) -> str:
    """A template that writes `text` for an image."""
    return templates.INTERNVL.replace("<IMG_CONTEXT>\n", text)


_COMPASS_IDS: dict[str, Any] = {
    "image_token_id": "id:<|IMAGE_PAD|>",
    "video_token_id": "id:<|VIDEO_PAD|>",
    "vision_start_token_id": "id:<|VISION_START|>",
    "vision_end_token_id": "id:<|VISION_END|>",
}

RECENT = {
    "glmga": _like(
        _GLM,
        config=_GLM.config | {"model_type": "glmga"},
        images=_GLM.images | {"image_processor_type": "GlmgaImageProcessor"},
        processor={"processor_class": "Glm46VProcessor"},
    ),
    "cohere_compass": _like(
        _QWEN3,
        template=_placeholder("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
        tokens=f"{CHATML} <|VISION_START|> <|VISION_END|> <|IMAGE_PAD|> <|VIDEO_PAD|>",
        config=_QWEN3.config
        | _COMPASS_IDS
        | {"model_type": "cohere_compass", "text_config": TEXT | _SLIDING_THEN_FULL | _ROPE_BY_KIND},
        processor={"processor_class": "CohereCompassProcessor"},
    ),
    "mistral_large4": _like(
        GRID["mistral3"],
        config=GRID["mistral3"].config
        | {
            "model_type": "mistral_large4",
            "text_config": TEXT
            | _LATENT
            | {
                "index_topk": 512,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "layer_types": ["indexed_attention"] * 2,
                "indexer_types": ["full"] * 2,
                "no_rope_layers": [1, 1],
                "kv_source_layers": [0, 1],
                "mlp_layer_types": ["dense", "sparse"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "step3p7": Family(
        _placeholder("<im_patch>"),
        f"{CHATML} <im_patch> <im_start> <im_end> <patch_start> <patch_end> <patch_newline>",
        {
            "model_type": "step3p7",
            "image_token_id": "id:<im_patch>",
            # layers with another number of heads than the others
            "text_config": TEXT
            | _SLIDING_THEN_FULL
            | _ROPE_BY_KIND
            | {"num_sliding_attention_heads": 4, "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4}
            | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "share_expert_dim": 16},
            "vision_config": VISION
            | {"mlp_ratio": 2.0, "image_size": 56, "patch_size": 14, "max_position_embeddings": 64},
        },
        images={"image_processor_type": "Step3p7ImageProcessor", "size": {"height": 56, "width": 56}},
        processor={"processor_class": "Step3p7Processor"},
        needs="torchvision",
    ),
    "minimax_m3_vl": Family(
        _placeholder("]<]image[>["),
        f"{CHATML} ]<]image[>[ ]<]video[>[ ]<]vision_start[>[ ]<]vision_end[>[ ]<]start_of_image[>[ ]<]end_of_image[>[",
        {
            "model_type": "minimax_m3_vl",
            "image_token_id": "id:]<]image[>[",
            "image_token_index": "id:]<]image[>[",
            "video_token_id": "id:]<]video[>[",
            "text_config": TEXT
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "rotary_dim": 8}
            | {"layer_types": ["full_attention"] * 2, "dense_intermediate_size": 32, "shared_intermediate_size": 16},
            "vision_config": VISION | {"image_size": 64, "patch_size": 8, "spatial_merge_size": 2},
        },
        images={"image_processor_type": "MiniMaxM3VLImageProcessor", "patch_size": 8, "merge_size": 2}
        | {"size": {"shortest_edge": 256, "longest_edge": 4096}},
        processor={"processor_class": "MiniMaxM3VLProcessor"},
        needs="torchvision",
    ),
    "fast_vlm": _like(
        _LLAVA,
        config={
            "model_type": "fast_vlm",
            "image_token_index": "id:<image>",
            "image_seq_length": 1,
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "do_pooling": True,
                "hidden_size": 128,
                "model_args": {
                    "inference_mode": True,
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [8, 16, 16, 32, 64],
                },
            },
        },
        images=_CLIP_IMAGES | {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}},
        processor={"processor_class": "LlavaProcessor", "patch_size": 64, "num_additional_image_tokens": 0}
        | {"vision_feature_select_strategy": "full"},
        needs="torchvision timm",
    ),
}
