"""The embedding of an item as sentence-transformers computes it from a directory: by its files, with transformers.

This checks what was written without that library. Items go through the model one at a time, so there is no padding but
what the files ask for.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.contrastive.sentence_folder import POOLING, TRANSFORMER
from mmtrain.encoding.messages import as_messages
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.tower_processor import TowerProcessor
from mmtrain.model.transfer import all_on_device
from mmtrain.records.pairs import Item


@torch.no_grad()
def sentence_embedding(
    folder: Path, model: Any, processor: ChatProcessor | TowerProcessor, item: Item, images: Sequence[PIL.Image.Image]
) -> Tensor:
    """(width,) a unit vector, by the files in `folder`. `model`: what transformers makes of the weights there.

    Raises whatever the model and its processor raise.
    """
    settings = _read(folder / TRANSFORMER)
    if isinstance(processor, ChatProcessor):
        kind, inputs = "message", _chat_inputs(processor, settings["processing_kwargs"], item, images)
    else:
        kind = "image" if images else "text"
        inputs = _tower_inputs(processor, settings["processing_kwargs"], item, images)
    how = settings["modality_config"][kind]
    found = _output(model, how["method"], all_on_device(inputs, model.device), how["method_output_name"])
    if settings["module_output_name"] == "token_embeddings":
        found = _pooled(found, _read(folder / POOLING)["pooling_mode"])
    return F.normalize(found.float(), dim=-1)[0]


def _output(model: Any, method: str, inputs: dict[str, Any], path: str | list[str | int]) -> Tensor:
    """(1, width), or (1, num_tokens, width)"""
    call = getattr(model, method)
    if method != "forward":
        inputs = {name: value for name, value in inputs.items() if name in inspect.signature(call).parameters}
    elif "hidden_states" in path:
        inputs = {**inputs, "output_hidden_states": True, "use_cache": False}
    found = call(**inputs, return_dict=True)
    for name in [path] if isinstance(path, str) else path:
        found = getattr(found, name) if isinstance(name, str) else found[name]
    output: Tensor = found
    return output


def _chat_inputs(
    processor: ChatProcessor, processing: dict[str, Any], item: Item, images: Sequence[PIL.Image.Image]
) -> dict[str, Any]:
    """The instruction, which is called prompt there, as the system text; then one turn of the user."""
    messages = processor.template.as_wanted(as_messages(item.conversation().messages))
    left = iter(images)
    for part in (
        part for message in messages if not isinstance(message["content"], str) for part in message["content"]
    ):
        if part["type"] == "image":
            part["image"] = next(left)
    own = processor.tokenizer.wrapped if processor.images is None else processor.images.processor
    made = own.apply_chat_template(
        messages,
        chat_template=processor.template.source,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **processing["chat_template"],
    )
    return dict(made)


def _tower_inputs(
    processor: TowerProcessor, processing: dict[str, Any], item: Item, images: Sequence[PIL.Image.Image]
) -> dict[str, Any]:
    """By the family's own processor, whose defaults can differ from those of its image processor."""
    own = processor.family(image_processor=processor.images, tokenizer=processor.tokenizer)
    what = {"images": list(images)} if images else {"text": [item.text]}
    text = {"padding": True, "truncation": "longest_first", **processing["text"]}
    return dict(own(**what, text_kwargs=text, images_kwargs={}, common_kwargs={"return_tensors": "pt"}))


def _pooled(tokens: Tensor, mode: str) -> Tensor:
    """(1, width) from (1, num_tokens, width), where no token is padding."""
    return tokens[:, -1] if mode == "lasttoken" else tokens.mean(1)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
