"""Families of text models."""

from typing import Any

from support import family_templates as templates
from support.family_models import CHATML, COHERE, LFM2, SPLIT, TEXT, Family


def _chatml(**config: Any) -> Family:
    """A family with another's template: what is tried is its model."""
    return Family(templates.QWEN3_VL, CHATML, TEXT | config)


_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_WITHOUT_SETTINGS = [
    "apertus",
    "arcee",
    "bitnet",
    "bloom",
    "cohere",
    "doge",
    "ernie4_5",
    "exaone4",
    "glm4",
    "gpt_bigcode",
    "gpt_neox",
    "hrm_text",
    "hunyuan_v1_dense",
    "llama4_text",
    "minimax",
    "mpt",
    "nemotron",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phimoe",
    "recurrent_gemma",
    "rwkv",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xlstm",
]
"""Families whose other settings are as in their configuration's class."""
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}

TEXT_ONLY = {
    "cohere2": Family(templates.COHERE2, config=TEXT | {"model_type": "cohere2"}, strings="all", **COHERE),
    "gpt_oss": Family(
        templates.GPT_OSS,
        "<|startoftext|> <|endoftext|> <|return|> <|start|> <|end|> <|message|> <|channel|> <|call|>",
        TEXT | {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1},
        bos="<|startoftext|>",
        eos="<|return|>",
        stops=("<|call|>", "<|endoftext|>"),
        strings="all",
        **SPLIT,
    ),
    "lfm2": Family(
        templates.LFM2,
        f"<|pad|> <|startoftext|> {CHATML}",
        LFM2 | {"model_type": "lfm2"},
        bos="<|startoftext|>",
        pad="<|pad|>",
        bos_in_front=True,
        strings="all",
    ),
    "falcon_mamba": Family(
        templates.FALCON_MAMBA,
        "<|endoftext|>",
        {"model_type": "falcon_mamba", "vocab_size": "vocabulary", "hidden_size": 32, "num_hidden_layers": 2}
        | {"state_size": 4},
        eos="<|endoftext|>",
        strings="all",
        unended="each",
    ),
    "granite": Family(
        templates.GRANITE,
        "<|end_of_text|> <|start_of_role|> <|end_of_role|>",
        TEXT | {"model_type": "granite"},
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        strings="all",
        **SPLIT,
    ),
    "modernbert-decoder": Family(  # its head is called `decoder`
        templates.QWEN3_VL, CHATML, TEXT | {"model_type": "modernbert-decoder"}, bos="<|endoftext|>"
    ),
    "llama": Family(
        templates.QWEN3_VL,
        f"{CHATML} <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        TEXT | {"model_type": "llama"},
        bos="<|begin_of_text|>",
        stops=("<|eot_id|>",),
        strings="all",
        **SPLIT,
    ),
    "qwen2": _chatml(model_type="qwen2"),
    "qwen3": _chatml(model_type="qwen3"),
    "qwen3_moe": _chatml(model_type="qwen3_moe", **_EXPERTS),
    "qwen2_moe": _chatml(model_type="qwen2_moe", shared_expert_intermediate_size=32, **_EXPERTS),
    "glm4_moe": _chatml(model_type="glm4_moe", n_shared_experts=1, **_ROUTED),
    "deepseek_v3": _chatml(
        model_type="deepseek_v3",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        **_ROUTED | {"head_dim": 8, "num_key_value_heads": 2},
    ),
    "qwen3_next": _chatml(
        model_type="qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=32,
        **_EXPERTS,
        **_LINEAR,
    ),
    "gemma2": _chatml(model_type="gemma2", **_SLIDING),
    "gemma3n_text": _chatml(
        model_type="gemma3n_text",
        vocab_size_per_layer_input="vocabulary",
        hidden_size_per_layer_input=8,
        activation_sparsity_pattern=None,
        laurel_rank=4,
        num_kv_shared_layers=0,
        **_SLIDING,
    ),
    "gemma3_text": _chatml(model_type="gemma3_text", **_SLIDING),
    "mistral": _chatml(model_type="mistral", sliding_window=16),
    "mixtral": _chatml(model_type="mixtral", num_local_experts=4),
    "phi3": _chatml(model_type="phi3"),
    "olmo2": _chatml(model_type="olmo2"),
    "granitemoehybrid": _chatml(
        model_type="granitemoehybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
        position_embedding_type="rope",
        **_MAMBA,
    ),
    "jamba": _chatml(
        model_type="jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False
    ),
    "mamba": Family(
        templates.QWEN3_VL,
        CHATML,
        {"model_type": "mamba", "vocab_size": "vocabulary", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "falcon_h1": _chatml(model_type="falcon_h1", mamba_d_ssm=64, **_MAMBA),
    "nemotron_h": _chatml(
        model_type="nemotron_h",
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
    ),
    "mamba2": Family(
        templates.QWEN3_VL,
        CHATML,
        {"model_type": "mamba2", "vocab_size": "vocabulary", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    ),
    "bamba": _chatml(model_type="bamba", attn_layer_indices=[1], **_MAMBA),
    "deepseek_v2": _chatml(
        model_type="deepseek_v2",
        **_ROUTED
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"head_dim": 8, "num_key_value_heads": 2},
    ),
    "ernie4_5_moe": _chatml(
        model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1
    ),
    "gemma4_text": _chatml(
        model_type="gemma4_text",
        vocab_size_per_layer_input="vocabulary",
        hidden_size_per_layer_input=8,
        global_head_dim=32,
        **_SLIDING,
    ),
    "afmoe": _chatml(model_type="afmoe", num_local_experts=4, **_SLIDING, **_EXPERTS),
    "laguna": _chatml(
        model_type="laguna", layer_types=["full_attention"] * 2, shared_expert_intermediate_size=32, **_EXPERTS
    ),
    **{name: _chatml(model_type=name) for name in _WITHOUT_SETTINGS},
}
