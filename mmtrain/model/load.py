"""The base model, from a directory in the transformers format or the local hub cache."""

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.logging import ERROR, disable_progress_bar, get_verbosity, set_verbosity

from mmtrain.dataset.validate import LengthLimit
from mmtrain.encoding.directory import model_directory, takes_images
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.weight_files import check_weight_files
from mmtrain.safe_text import one_line, shown

_log = logging.getLogger(__name__)


def load_config(path: str) -> Any:
    """The model's configuration. Raises UserError where config.json is broken or of an unknown model."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file makes transformers raise anything
        raise UserError(f"{path}: the model's config cannot be loaded: {one_line(error)}") from None


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with this configuration."""
    if not takes_images(config):
        return AutoModelForCausalLM
    is_image_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_image_text else AutoModelForMultimodalLM


def model_structure(path: str) -> Any:
    """The model without its weights: every tensor is on the meta device, which stores no values."""
    config = load_config(path)
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config).eval()
    except Exception as error:  # a broken config makes transformers raise anything
        raise UserError(f"{path}: the model cannot be made: {type(error).__name__}: {one_line(error)}") from None


def length_limit(path: str, max_length: int) -> LengthLimit:
    """The longest sample: `max_length` tokens, or fewer where the model was made for fewer positions."""
    positions = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    if positions and positions < max_length:
        return LengthLimit(positions, "the model's positions, max_position_embeddings in its config.json")
    return LengthLimit(max_length, "data.max_length")


def checkpoint_activations(model: Any) -> None:
    """Have every layer computed again in the backward pass. Raises UserError where the model cannot.

    Where peft has added adapters, transformers makes the embeddings of tokens and of images require gradients, which
    only reentrant checkpointing needs: a frozen vision tower would be computed twice and passed through backward.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"run.activation_checkpointing: {one_line(error)}; set it to false") from None
    model.disable_input_require_grads()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it asks for this flag; its dropouts keep their own, which is off


def compile_layers(model: Any) -> None:
    """Compile the language model's repeated layers one by one: they share their code, so the first is the one that
    takes time. The number of tokens is left open, as every micro-batch has another."""
    for module in model.get_decoder().modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _from_pretrained(path: str, config: Any, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers found wrong with its weights: its own report is a table, in other words."""
    disable_progress_bar()  # loading is a second of a run that has a bar of its own
    verbosity = get_verbosity()
    set_verbosity(ERROR)
    try:
        model, info = auto_class(config).from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a broken directory makes transformers raise anything
        raise UserError(f"{path}: the model cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    finally:
        set_verbosity(verbosity)
    return model, info


def load_model(path: str, dtype: str, processor: ChatProcessor) -> Any:
    """The model on the CPU in `dtype`, in eval mode: the base model's own dropout is never on.

    Raises UserError where files are broken, weights are missing, not finite or of other shapes, or the tokenizer has
    ids the model has no embedding for.
    """
    config = load_config(path)
    check_weight_files(model_directory(path))
    if getattr(config, "transformers_weights", None) is not None:  # it may name a pickle
        raise UserError(f"{path}: config.json: transformers_weights is not supported: remove the key")
    model, info = _from_pretrained(path, config, dtype)
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        name, in_file, expected = shapes[0]
        raise UserError(
            f"{path}: {len(shapes)} weights have other shapes than config.json asks for, such as {shown(name)}: "
            f"{tuple(in_file)} in the file, {tuple(expected)} expected"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: {len(missing)} weights are missing, such as {shown(missing[0])}")
    _check_finite(model, path)
    unused = sorted(info["unexpected_keys"])
    if unused:
        _log.warning(
            "warning: %s: %d weights are not used by the model, such as %s", path, len(unused), shown(unused[0])
        )
    num_embeddings = model.get_input_embeddings().num_embeddings
    largest = max(processor.tokenizer.wrapped.get_vocab().values())
    if largest >= num_embeddings:
        raise UserError(f"{path}: the tokenizer has ids up to {largest} and the model embeddings for {num_embeddings}")
    return model.eval()


def _check_finite(model: Any, path: str) -> None:
    """Raise UserError naming a weight that has a value which is NaN or infinite."""
    weights = (item for item in model.state_dict().items() if item[1].is_floating_point() and item[1].numel())
    broken = [name for name, weight in weights if not all(torch.isfinite(end) for end in torch.aminmax(weight))]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} weights have values that are NaN or infinite, such as {shown(broken[0])}: "
            "expected finite numbers; copy or convert the model again"
        )
