"""Families of text models."""

from support import family_templates as templates
from support.family_models import CHATML, COHERE, LFM2, SPLIT, TEXT, Family

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
}
