"""The tokenizer and image processor of a dual encoder, which embeds texts and images apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from mmtrain.encoding.directory import load_image_processor, model_directory, processor_class
from mmtrain.encoding.image_runner import widened
from mmtrain.errors import UserError
from mmtrain.safe_text import one_line


@dataclass(frozen=True, slots=True)
class TowerProcessor:
    """Turns texts into ids and images into tensors, as inference does."""

    tokenizer: Any
    images: Any
    max_length: int
    """Tokens of the longest text that the text tower takes, special tokens included."""
    family: Any
    """The class of transformers that has both."""
    image_settings: Mapping[str, Any]
    """Settings in place of the image processor's own."""

    lays_out_together = True
    given_template = None

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def pads_left(self) -> bool:
        return bool(self.tokenizer.padding_side == "left")

    @property
    def has_mask(self) -> bool:
        """Whether the text tower gets a mask of the padding."""
        return "attention_mask" in self.tokenizer.model_input_names

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included; nothing is cut off."""
        if not texts:
            return []
        made: list[list[int]] = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        return made

    def image_inputs(self, images: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """The tensors of images, one row for each."""
        made = self.images(images=list(images), return_tensors="pt")
        return {key: widened(value) for key, value in made.items() if isinstance(value, Tensor)}


def load_tower_processor(path: str, image_settings: Mapping[str, Any]) -> TowerProcessor:
    """The processor in a model directory or the local hub cache, with these settings in place of its image processor's
    own. Raises UserError, naming `path`."""
    directory = model_directory(path)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=False
        )
        images = load_image_processor(directory, image_settings)
        family = processor_class(directory, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a broken directory makes transformers raise anything
        raise UserError(f"{path}: the processor cannot be loaded: {one_line(error)}") from None
    settings = getattr(family, "text_kwargs", {})
    limits = (
        tokenizer.model_max_length,
        getattr(config.text_config, "max_position_embeddings", None),
        settings.get("max_length") if isinstance(settings, dict) else None,
    )
    longest = min(int(limit) for limit in limits if limit)
    return TowerProcessor(tokenizer, images, longest, family, image_settings)
