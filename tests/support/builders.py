"""Small models of three kinds with random weights, a mixed set of samples, and a record of what is computed."""

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tokenizers import Tokenizer, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mmtrain.config.run_section import Run

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data_samples" / "tiny-vlm"
SHAPES = ROOT / "data_samples" / "shapes"
SHARED = ROOT.parent / "shared" / "data"

DECODER_SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a tiny decoder of any family."""

# Written in the manner of LLaVA-1.5's: images first, a space after every text, no end token, no BOS.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def randomized(model: Any, path: Path) -> Path:
    """Weights large enough for the images and the context to matter, so that a leak or a mix-up shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    model.save_pretrained(path)
    return path


def _copy_tokenizer(path: Path, names: tuple[str, ...]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(TINY / name, path / name)


def copy_text_tokenizer(path: Path) -> None:
    """A tokenizer with a chat template, for a model without images."""
    _copy_tokenizer(path, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("processor_class", None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def make_qwen(path: Path) -> Path:
    """Qwen2.5-VL, two layers of each part."""
    _copy_tokenizer(
        path, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
    )
    config = Qwen2_5_VLConfig.from_pretrained(TINY)
    config.vision_config.depth = 2
    config.vision_config.fullatt_block_indexes = [1]
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    return randomized(Qwen2_5_VLForConditionalGeneration(config), path)


def make_text(path: Path) -> Path:
    """A causal language model without images (Qwen3's architecture)."""
    copy_text_tokenizer(path)
    vocabulary = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return randomized(Qwen3ForCausalLM(config), path)


def make_llava(path: Path) -> Path:
    """LLaVA-1.5: CLIP, a two-layer projector, Llama; its tokenizer puts a BOS in front."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>", "<pad>"])
    bos, eos, image, pad = (tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>", "<pad>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(LLAVA_TEMPLATE)
    size = {"height": 28, "width": 28}
    image_processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": {"shortest_edge": 28}}
    (path / "preprocessor_config.json").write_text(json.dumps(image_processor))
    layout = {"patch_size": 7, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **layout}))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=7, projection_dim=32, **small).to_dict(),
        text_config=LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=2048,
            **(small | {"hidden_size": 64, "num_hidden_layers": 2}),
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        ).to_dict(),
        image_token_index=image,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return randomized(LlavaForConditionalGeneration(config), path)


MAKERS = {"qwen2_5_vl": make_qwen, "llava": make_llava, "text": make_text}


def mixed_rows(folder: Path, with_images: bool) -> list[dict[str, Any]]:
    """Eight samples of unequal length: text only, one image, two, several turns; images of unequal size."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for i, (width, height) in enumerate([(64, 64), (96, 48), (50, 120), (64, 64), (80, 80)]):
        source = sorted((SHAPES / "images").iterdir())[i]
        names.append(f"images/{i}.png")
        PIL.Image.open(source).convert("RGB").resize((width, height)).save(folder / names[-1])

    def row(turns: list[tuple[str, str]], images: list[str]) -> dict[str, Any]:
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question if with_images else question.replace("<image>", "")})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages, "images": images if with_images else []}

    return [
        row([("<image>What shape is this?", "a circle")], names[:1]),
        row([("How are you today?", "Very well, thank you. And how are you?")], []),
        row([("<image>What colour?", "red"), ("And what shape?", "It is a long, thin rectangle.")], names[1:2]),
        row([("<image><image>Which is larger?", "the second")], names[2:4]),
        row([("Say a word.", "word")], []),
        row([("<image>Describe it in a few words.", "a yellow triangle on grey")], names[4:]),
        row([("One?", "1"), ("Two?", "2"), ("Three? <image>", "It is three, and more than three: 3333")], names[:1]),
        row([("What is this? <image>", "nothing at all that I know of")], names[3:4]),
    ]


def train_and_run(**settings: Any) -> dict[str, dict[str, Any]]:
    """The sections `train` and `run` of a config, with each key in the one that it belongs to."""
    run = {key: value for key, value in settings.items() if key in Run.model_fields}
    return {"train": {key: value for key, value in settings.items() if key not in run}, "run": run}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that are called, and the types of the tensors they give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **kwargs or {})
        self.names.append(str(function))
        if isinstance(result, torch.Tensor):
            self.dtypes.add(result.dtype)
        return result
