"""The base model, from a directory in the transformers format or the local hub cache."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.logging import disable_progress_bar

from mmtrain.data.check import LengthLimit
from mmtrain.data.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.foreign_text import shown


def load_config(path: str) -> Any:
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def length_limit(path: str, max_length: int) -> LengthLimit:
    """The longest sample: `max_length` tokens, or fewer where the model was made for fewer positions."""
    positions = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    if positions and positions < max_length:
        return LengthLimit(positions, "the model's positions, max_position_embeddings in its config.json")
    return LengthLimit(max_length, "data.max_length")


def checkpoint_activations(model: Any) -> None:
    """Have every layer computed again in the backward pass. Raises UserError where the model cannot."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"train.activation_checkpointing: {str(error).splitlines()[0]}; set it to false") from None
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it asks for this flag; its dropouts keep their own, which is off


def compile_layers(model: Any) -> None:
    """Compile the language model's repeated layers one by one: they share their code, so the first is the one that
    takes time. The number of tokens is left open, as every micro-batch has another."""
    for module in model.get_decoder().modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def load_model(path: str, dtype: str, processor: ChatProcessor) -> Any:
    """The model on the CPU in `dtype`, in eval mode: the base model's own dropout is never on.

    Raises UserError where weights are missing or the tokenizer has ids the model has no embedding for.
    """
    config = load_config(path)
    kind = AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    disable_progress_bar()  # loading is a second of a run that has a bar of its own
    try:
        model, info = kind.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the model cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: {len(missing)} weights are missing, such as {shown(missing[0])}")
    num_embeddings = model.get_input_embeddings().num_embeddings
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise UserError(f"{path}: the tokenizer has ids up to {largest} and the model embeddings for {num_embeddings}")
    return model.eval()
