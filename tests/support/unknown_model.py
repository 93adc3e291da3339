"""An image-text model that no library knows: classes, names and marks made up here, and variants of each.

Its image encoder is the `eye`, its projector the `bridge`, its language model the `talker` and its head the `mouth`; an
image is written as `<<pic>>`. A variant changes one thing that mmtrain cannot know from a name.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.auto import processing_auto

from support.builders import randomized
from support.family_models import CHATML, TEXT
from support.label_models import byte_level

SIDE, PATCH = 28, 7
NUM_PLACEHOLDERS = (SIDE // PATCH) ** 2
MARKS = "<<pic>> <<open>> <<row>> <<shut>>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<<pic>>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class EyeConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "pic_eye"

    def __init__(self, hidden_size: int = 24, patch_size: int = PATCH, **others: Any) -> None:
        self.hidden_size, self.patch_size = hidden_size, patch_size
        super().__init__(**others)


class PicConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "pic"
    sub_configs: ClassVar = {"vision_config": EyeConfig, "text_config": LlamaConfig}
    attribute_map: ClassVar = {"image_token_id": "pic_id"}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        pic_id: int | None = None,
        variant: str = "plain",
        **others: Any,
    ) -> None:
        self.vision_config = EyeConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config
        self.pic_id, self.variant = pic_id, variant
        super().__init__(**others)


class PicPreTrained(PreTrainedModel):  # type: ignore[misc]
    config_class: Any = PicConfig
    base_model_prefix = "body"
    _supports_sdpa = True
    _supports_attention_backend = True


class Eye(PicPreTrained):
    config_class = EyeConfig

    def __init__(self, config: EyeConfig) -> None:
        super().__init__(config)
        self.retina = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.nerve = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        seen = self.retina(pixel_values).flatten(2).transpose(1, 2)
        return torch.tanh(self.nerve(seen))  # (images, patches, hidden)


class Pic(PicPreTrained):
    """Everything but the head."""

    def __init__(self, config: PicConfig) -> None:
        super().__init__(config)
        self.talker = AutoModel.from_config(config.text_config)
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.eye = Eye(config.vision_config)
        if config.variant == "fixed shift":
            self.shift = nn.Parameter(torch.ones(config.text_config.hidden_size), requires_grad=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features = self.bridge(self.eye(pixel_values))
        if self.config.variant == "neighbours":  # each image sees a little of all the others of the call
            features = features + 0.1 * features.mean(0, keepdim=True)
        return BaseModelOutputWithPooling(pooler_output=features)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        embeddings = self.talker.get_input_embeddings()(input_ids)
        found = (mm_encoder_outputs or {}).get("image")
        if found is None and pixel_values is not None:
            found = self.get_image_features(pixel_values)
        if found is not None:
            places = (input_ids == self.config.pic_id).unsqueeze(-1).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(places, found.pooler_output.to(embeddings.dtype))
        if self.config.variant == "fixed shift":
            embeddings = embeddings + self.shift
        if self.config.variant == "no positions":
            position_ids = None
        if self.config.variant == "own positions" and position_ids is None:
            position_ids = 2 * torch.arange(input_ids.shape[1])[None]
        if self.config.variant == "looks back":  # one token sees the one before it, whatever the masks say
            embeddings = embeddings + 0.5 * nn.functional.pad(embeddings, (0, 0, 1, -1))
        if self.config.variant == "looks ahead":
            embeddings = embeddings + 0.5 * nn.functional.pad(embeddings, (0, 0, -1, 1))
        if self.config.variant == "running mean":  # the same over all tokens before it
            counts = torch.arange(1, embeddings.shape[1] + 1, dtype=embeddings.dtype)[:, None]
            embeddings = embeddings + embeddings.cumsum(1) / counts
        return self.talker(inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, **others)


class PicForConditionalGeneration(PicPreTrained, GenerationMixin):  # type: ignore[misc]
    def __init__(self, config: PicConfig) -> None:
        super().__init__(config)
        self.body = Pic(config)
        self.mouth = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.mouth

    def get_input_embeddings(self) -> Any:
        return self.body.talker.get_input_embeddings()

    def get_decoder(self) -> Any:
        return self.body.talker

    def get_image_features(self, pixel_values: Tensor, **others: Any) -> BaseModelOutputWithPooling:
        return self.body.get_image_features(pixel_values, **others)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.body(input_ids, pixel_values, mm_encoder_outputs=mm_encoder_outputs, **inputs, **others)[0]
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[logits_to_keep] if logits_to_keep.ndim == 2 else hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.mouth(hidden)
        if self.config.variant == "scaled head":
            logits = logits * 3.0
        if self.config.variant == "capped head":
            logits = torch.tanh(logits / 2.0) * 2.0
        return CausalLMOutputWithPast(logits=logits)


class PicForAllLogits(PicForConditionalGeneration):
    """Its forward takes no `logits_to_keep`."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **others: Any
    ) -> CausalLMOutputWithPast:
        others = {key: value for key, value in others.items() if key != "logits_to_keep"}
        return super().forward(input_ids, pixel_values, **others)


class PicProcessor(ProcessorMixin):  # type: ignore[misc]
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, style: str = "plain"
    ) -> None:
        self.style = style
        if style != "no mark":
            self.image_token = "<<pic>>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        row = "<<pic>>" * (SIDE // PATCH)
        if self.style == "framed":
            return "<<open>>" + f"{row}<<row>>" * (SIDE // PATCH) + "<<shut>>"
        if self.style == "spaced":
            return f"\n{row * (SIDE // PATCH)}\n\n"
        return row * (SIDE // PATCH)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **others: Any) -> Any:
        images, text, *rest = super().prepare_inputs_layout(images=images, text=text, **others)
        if self.style == "images first" and text is not None:
            text = ["<<pic>>" * one.count("<<pic>>") + one.replace("<<pic>>", "") for one in text]
        if self.style == "token first" and text is not None:
            text = ["<|endoftext|>" + one for one in text]
        if self.style == "adds a word" and text is not None:
            text = ["so " + one for one in text]
        return images, text, *rest


def register() -> None:
    """Make the Auto classes know the model, for as long as the process lives."""
    AutoConfig.register("pic", PicConfig, exist_ok=True)
    AutoModelForImageTextToText.register(PicConfig, PicForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(PicConfig, PicProcessor, exist_ok=True)
    assert processing_auto.processor_class_from_name("PicProcessor") is PicProcessor


def make_unknown(folder: Path, variant: str = "plain", style: str = "plain") -> Path:
    """A directory of the model with random weights: `variant` of the model, `style` of its processor."""
    register()
    folder.mkdir(parents=True)
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in f"{CHATML} {MARKS}".split()])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 16
    text = {**TEXT, "vocab_size": size, "eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": 0}
    pic_id = tokenizer.token_to_id("<<pic>>")
    config = PicConfig(vision_config=EyeConfig(), text_config=LlamaConfig(**text), pic_id=pic_id, variant=variant)
    randomized(PicForConditionalGeneration(config), folder)
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": SIDE, "width": SIDE},
            "size": {"shortest_edge": SIDE},
        },
        "processor_config.json": {"processor_class": "PicProcessor", "style": style},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
