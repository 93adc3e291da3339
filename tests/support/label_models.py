"""Small model directories without weights: a tokenizer, a chat template and what else a processor is loaded from."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support.builders import LLAVA_TEMPLATE

SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
_CORPUS = [
    "the word is red\n\n\nand the sky is blue\n\n",
    "what is it: a circle or a square?\n\n",
    "user assistant system model USER: ASSISTANT: SYSTEM: [INST] [/INST] think",
    "** bold **: 12 30 42. Hello, world! The quick brown fox jumps over the lazy dog.",
] * 3
_GPT_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trained(pre: Any, corpus: list[str] = _CORPUS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted({c for text in corpus for c in text}))
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_level(split: str | None = None, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), level] if split else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's manner, with Qwen's NFC normalizer."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_level_split() -> Tokenizer:
    """Llama 3's and GPT-4's manner: punctuation takes the newlines after it."""
    return _byte_level(_GPT_SPLIT)


def byte_level_prefix() -> Tokenizer:
    return _byte_level(add_prefix_space=True)


def _byte_fallback(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary.setdefault(token, len(vocabulary))
    return Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def metaspace_first() -> Tokenizer:
    """SentencePiece as newer conversions have it; newlines have merges."""
    pre = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _byte_fallback(*_trained(pre_tokenizers.Metaspace(prepend_scheme="always", split=True)))
    tokenizer.pre_tokenizer = pre
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def legacy() -> Tokenizer:
    """SentencePiece as Llama 2 has it: a normalizer puts the space before every stretch between special tokens."""
    tokenizer = metaspace_first()
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    bare = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = tokenizer.decoder
    return bare


def unigram() -> Tokenizer:
    """Its vocabulary holds the special tokens as pieces, as SentencePiece's unigram models do."""
    pieces = [(token, 0.0) for token in SPECIALS] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    characters = sorted({c for text in _CORPUS for c in text if c != " "})
    pieces += [("▁", -3.0), *((c, -4.0) for c in characters), ("▁the", -3.5), ("▁is", -3.6), ("red", -3.7)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_split": byte_level_split,
    "byte_level_prefix": byte_level_prefix,
    "metaspace_first": metaspace_first,
    "legacy": legacy,
    "unigram": unigram,
}

_CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n" + _CONTENT + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_NO_END = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
_HEADER_ENDS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
_LAST_DIFFERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or r) %}"
    "<think>\n{{ r }}\n</think>\n\n{{ c.lstrip('\\n') }}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Template:
    """A chat template, and by hand what the model must write for an answer: `before` + words + `end`."""

    text: str
    end: str
    before: str = ""
    between: str = ""
    parts: bool = False
    trims: bool = False
    system: bool = True
    images: bool = False
    own_end: bool = True

    def supervised(self, content: str | list[str]) -> str:
        parts = [content] if isinstance(content, str) else content
        words = self.between.join(parts)
        return self.before + (words.strip() if self.trims else words) + self.end


TEMPLATES = {
    "chatml": Template(_CHATML, "<|im_end|>", parts=True, images=True),
    "llava": Template(LLAVA_TEMPLATE, "</s>", before=" ", between=" ", parts=True, images=True, own_end=False),
    "llama3": Template(_LLAMA3, "<|eot_id|>", trims=True),
    "gemma": Template(_GEMMA, "<end_of_turn>", parts=True, trims=True, system=False, images=True),
    "mistral": Template(_MISTRAL, "</s>", before=" ", system=False),
    "no_end": Template(_NO_END, "</s>", before="\n", own_end=False),
    "header_ends": Template(_HEADER_ENDS, "</s>", own_end=False),
}
OTHER_TEMPLATES = {
    "last_differs": Template(_LAST_DIFFERS, ""),
    "qwen3": Template(_QWEN3, "<|im_end|>"),
}

IMAGE_SIZE = 28
NUM_PLACEHOLDERS = 16  # (28 / 7) ** 2


def make_directory(
    path: Path,
    tokenizer: str,
    template: str | None,
    vision: bool = False,
    bos_in_front: bool = False,
    image_is_special: bool = True,
    strips: bool | str = False,
    more_specials: Sequence[str] = (),
) -> Path:
    """`bos_in_front`: the tokenizer's post-processor puts `<s>` before every text, as LLaVA-1.5's does.

    `strips`: special tokens swallow the whitespace after them, as Phi-3's do; "before": that before them.
    """
    path.mkdir(parents=True, exist_ok=True)
    made = TOKENIZERS[tokenizer]()
    for token in (*SPECIALS, *more_specials):
        special = token != "<image>" or image_is_special
        added = AddedToken(token, special=special, normalized=False, rstrip=strips is True, lstrip=strips == "before")
        _ = made.add_special_tokens([added]) if special else made.add_tokens([added])
    if bos_in_front:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    if vision and image_is_special:
        settings["image_token"] = "<image>"
    _write(path / "tokenizer_config.json", settings)
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    if not vision:
        _write(path / "config.json", {"model_type": "llama", "vocab_size": made.get_vocab_size()})
        return path
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    _write(
        path / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": {"shortest_edge": IMAGE_SIZE}},
    )
    layout = {"patch_size": 7, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    _write(path / "processor_config.json", {"processor_class": "LlavaProcessor", **layout})
    _write(
        path / "config.json",
        {
            "model_type": "llava",
            "image_token_index": made.token_to_id("<image>"),
            "text_config": {"model_type": "llama", "vocab_size": made.get_vocab_size()},
            "vision_config": {"model_type": "clip_vision_model", "image_size": IMAGE_SIZE, "patch_size": 7},
        },
    )
    return path


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
