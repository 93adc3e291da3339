"""Small models of families whose attention is not plain, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from support.builders import DECODER_SIZES, TINY, copy_text_tokenizer, randomized

WINDOW = 80
"""Tokens of a sliding window: more than the text of a sample that is tried where there is no window."""
PRETRAINED = 128
"""Tokens of the longest sample with the first set of rotary frequencies."""


def _sizes(**others: Any) -> dict[str, Any]:
    vocabulary = Tokenizer.from_file(str(TINY / "tokenizer.json")).get_vocab_size()
    return {**DECODER_SIZES, "vocab_size": vocabulary, **others}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_sizes()))


def _mixture() -> Any:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_sizes(**experts)))


def _windows() -> Any:
    return MistralForCausalLM(MistralConfig(**_sizes(sliding_window=WINDOW)))


def _sinks() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**_sizes(sliding_window=WINDOW, **experts)))


def _recurrent() -> Any:
    vocabulary = _sizes()["vocab_size"]
    return MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8))


def _convolution() -> Any:
    sizes = _sizes(layer_types=["conv", "full_attention"])
    del sizes["head_dim"]
    return Lfm2ForCausalLM(Lfm2Config(**sizes))


def _linear_attention() -> Any:
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    others = {"linear_value_head_dim": 8, "shared_expert_intermediate_size": 24}
    kinds = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_sizes(layer_types=kinds, **heads, **experts, **others)))


def _two_frequencies() -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    sizes = _sizes(rope_parameters=rope, max_position_embeddings=8 * PRETRAINED, pad_token_id=0)
    return Phi3ForCausalLM(Phi3Config(**sizes, original_max_position_embeddings=PRETRAINED))


TEXT_MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mixture": _mixture,
    "windows": _windows,
    "gpt_oss": _sinks,
    "mamba": _recurrent,
    "lfm2": _convolution,
    "qwen3_next": _linear_attention,
    "phi3": _two_frequencies,
}


def make_text_family(name: str, path: Path) -> Path:
    copy_text_tokenizer(path)
    return randomized(TEXT_MODELS[name](), path)


_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{{ '<boi>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_gemma3(path: Path) -> Path:
    """Gemma 3: the tokens of an image see each other in both directions."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer.add_special_tokens([*names.values(), "<end>", "<bos>", "<pad>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "bos_token": "<bos>",
        "pad_token": "<pad>",
        "extra_special_tokens": names,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(_TEMPLATE)
    image_processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
    (path / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (path / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 4})
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {key: tokenizer.token_to_id(value) for key, value in names.items()}
    text = _sizes(vocab_size=tokenizer.get_vocab_size(), sliding_window=16)
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_id=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        tie_word_embeddings=False,
    )
    return randomized(Gemma3ForConditionalGeneration(config), path)
