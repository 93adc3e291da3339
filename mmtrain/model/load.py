"""The base model, from a directory in the transformers format or the local hub cache."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.logging import ERROR, disable_progress_bar, get_verbosity, set_tqdm_hook, set_verbosity

from mmtrain.config.schema import Model
from mmtrain.config.tune_section import ComponentModules
from mmtrain.dataset.validate import LengthLimit
from mmtrain.encoding.directory import NO_OWN_CODE, is_dual_encoder, model_directory, needs_own_code, takes_images
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.components import decoder_of
from mmtrain.model.head import accept_positions
from mmtrain.model.quantization import (
    check_installed,
    check_quantized,
    dequantize_stored,
    quantization_config,
    stand_in_for_quantized,
)
from mmtrain.model.weight_files import check_finite_files, check_weight_files, is_finite, num_stored_values
from mmtrain.safe_text import error_line, one_line, shown
from mmtrain.text_files import json_object

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
ANY_LENGTH = 10**9
"""Tokens: no limit."""
_NONE = ComponentModules()


def load_config(path: str) -> Any:
    """The model's configuration. Raises UserError where config.json is broken or of an unknown model."""
    directory = model_directory(path)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file makes transformers raise anything
        reason = NO_OWN_CODE if needs_own_code(error) else f"the model's config cannot be loaded: {one_line(error)}"
        raise UserError(f"{path}: {reason}") from None


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with this configuration."""
    if is_dual_encoder(config):
        return AutoModel
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM if takes_images(config) else AutoModelForCausalLM


def model_structure(path: str) -> Any:
    """The model without its weights: every tensor is on the meta device, which stores no values."""
    with torch.device("meta"):
        return _new_model(path)


def _new_model(path: str, **settings: Any) -> Any:
    """The model with new weights. Raises UserError where its configuration is broken."""
    config = load_config(path)
    try:
        return auto_class(config).from_config(config, **settings).eval()
    except Exception as error:  # a broken config makes transformers raise anything
        raise UserError(f"{path}: the model cannot be made: {error_line(error)}") from None


def load_without_weights(settings: Model) -> Any:
    """The model as `load_model` gives it, with new weights of which none is read. For `WithoutValues`."""
    with no_init_weights():  # some draw again until all values are within bounds: without values, forever
        model = _new_model(settings.path, dtype=getattr(torch, settings.dtype))
    model.tie_weights()
    if settings.quantization is not None:
        stand_in_for_quantized(model)
    return model


def length_limit(path: str, max_length: int = ANY_LENGTH) -> LengthLimit:
    """The longest sample: `max_length` tokens, or fewer if the model has fewer positions."""
    positions = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < max_length:
        return LengthLimit(positions, "the model's positions, max_position_embeddings in its config.json")
    return LengthLimit(max_length, "data.max_length")


def checkpoint_activations(model: Any) -> None:
    """Compute the activations of every layer again in the backward pass. Raises UserError if the model does not support
    it.

    If peft has added adapters, transformers makes the embeddings of tokens and images require gradients. Only reentrant
    checkpointing needs that, and a frozen vision tower would run twice and have a backward pass, so it is undone.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"run.activation_checkpointing: {one_line(error)}; set it to false") from None
    model.disable_input_require_grads()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # required for checkpointing; the dropouts inside have their own flag, which is off


@contextmanager
def without_training_settings(model: Any) -> Iterator[None]:
    """Around generation by a model that is being trained: a checkpointed layer would drop the cache of earlier tokens,
    and a compiled one would be compiled again for each of its lengths."""
    checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    flags = [module.training for module in checkpointed]
    for module in checkpointed:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in zip(checkpointed, flags, strict=True):
            module.training = flag


def compile_layers(model: Any) -> None:
    """Compile the repeated layers of the language model one by one: they share their code, so only the first takes
    time. The number of tokens stays dynamic, because it differs between micro-batches."""
    for module in decoder_of(model).modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _from_pretrained(
    auto: Any, path: str, dtype: str, device: torch.device, tick: Callable[[], None], **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """The model that the class `auto` loads, and what transformers found about its weights, whose own report of it is
    switched off. Raises UserError where a weight is missing or has another shape."""
    disable_progress_bar()  # the run has its own progress bar
    verbosity = get_verbosity()
    set_verbosity(ERROR)
    hook = set_tqdm_hook(_ticking(tick))
    try:
        model, info = auto.from_pretrained(
            path,
            # without a map weights stay mapped from the file where their type is the file's, so processes share them;
            # quantized ones would go to a GPU
            device_map=None if device.type == "cpu" and "quantization_config" not in settings else {"": device},
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken directory makes transformers raise anything
        raise UserError(f"{path}: the model cannot be loaded: {error_line(error)}") from None
    finally:
        set_verbosity(verbosity)
        set_tqdm_hook(hook)
    _check_complete(info, path)
    return model, info


def _check_complete(info: dict[str, Any], path: str) -> None:
    """Raise UserError, naming a weight, if weights are missing or have wrong shapes."""
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        name, in_file, expected = shapes[0]
        raise UserError(
            f"{path}: {len(shapes)} weights have other shapes than config.json requires, such as {shown(name)}: "
            f"{tuple(in_file)} in the file, {tuple(expected)} expected"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: {len(missing)} weights are missing, such as {shown(missing[0])}")


def _quantized(path: str, config: Any, quantization: str, dtype: str, named: ComponentModules) -> dict[str, Any]:
    """What `_from_pretrained` needs to quantize the weights as they are read."""
    check_installed(quantization)
    check_finite_files(model_directory(path))
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(deepcopy(config), trust_remote_code=False)
    return {"quantization_config": quantization_config(skeleton, getattr(torch, dtype), named)}


def _ticking(tick: Callable[[], None]) -> Callable[..., Any]:
    """A hook for the progress bars of transformers that calls `tick` at every weight."""

    def each(values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            tick()
            yield value

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*map(each, args[:1]), *args[1:], **kwargs)

    return bar


def load_model(
    path: str,
    dtype: str,
    processor: ChatProcessor,
    device: torch.device = _CPU,
    tick: Callable[[], None] = lambda: None,
    quantization: str | None = None,
    named: ComponentModules = _NONE,
) -> Any:
    """The model of `load_weights`, for a chat. Raises UserError also if the tokenizer has ids without an embedding in
    the model."""
    model = load_weights(path, dtype, device, tick, quantization, named)
    if quantization is not None:
        check_quantized(model, path, named)
    accept_positions(model)
    check_vocabulary(path, processor.tokenizer.wrapped, model.get_input_embeddings())
    return model


def check_vocabulary(path: str, tokenizer: Any, embeddings: Any) -> None:
    """Raises UserError if the tokenizer has ids without an embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings.num_embeddings:
        raise UserError(
            f"{path}: the tokenizer has ids up to {largest}, but the model has only {embeddings.num_embeddings} "
            "embeddings"
        )


def load_weights(
    path: str,
    dtype: str,
    device: torch.device = _CPU,
    tick: Callable[[], None] = lambda: None,
    quantization: str | None = None,
    named: ComponentModules = _NONE,
    auto: Any = None,
) -> Any:
    """The model on `device` in `dtype`, in eval mode: the base model's own dropout is never on. On another device than
    the CPU no weight waits in host memory for the others. `tick` is called as weights are read. With
    `quantization` the language model's linear layers are quantized as they are read; `named` is what the config says
    of its components. `auto`: the class of transformers that loads it; None: `auto_class` chooses.

    Raises torch.OutOfMemoryError if the device is too small, and UserError if files are broken, or if weights are
    missing, not finite or have wrong shapes.
    """
    config = load_config(path)
    auto = auto or auto_class(config)
    _check_files(config, path)
    _check_defaults(config, path, auto)
    dequantize_stored(config, quantization, path)
    settings = {} if quantization is None else _quantized(path, config, quantization, dtype, named)
    model, info = _from_pretrained(auto, path, dtype, device, tick, config=config, **settings)
    _check_finite(model, path, tick)
    unused = sorted(info["unexpected_keys"])
    if unused:
        _log.warning(
            "warning: %s: %d weights are not used by the model, such as %s", path, len(unused), shown(unused[0])
        )
    return model.eval()


def _check_files(config: Any, path: str) -> None:
    check_weight_files(model_directory(path))
    if getattr(config, "transformers_weights", None) is not None:  # it may name a pickle
        raise UserError(f"{path}: config.json: transformers_weights is not supported: remove the key")


def _check_defaults(config: Any, path: str, auto: Any) -> None:
    """Raises UserError where config.json leaves a component out and the files have not even half of the weights of the
    one that transformers would make: all of it would be allocated before the first weight is found to be missing."""
    directory = model_directory(path)
    written = json_object(directory / "config.json")
    absent = [name for name in config.sub_configs if written.get(name) is None and getattr(config, name, None)]
    if not absent:
        return
    with torch.device("meta"), no_init_weights():
        skeleton = auto.from_config(deepcopy(config))
    num_weights, num_stored = sum(weight.numel() for weight in skeleton.parameters()), num_stored_values(directory)
    if num_weights > 2 * num_stored:
        raise UserError(
            f"{path}: config.json has no {' and no '.join(absent)}: by transformers' defaults the model has "
            f"{num_weights:,} weights, and its files have {num_stored:,}: copy config.json again"
        )


def _check_finite(model: Any, path: str, tick: Callable[[], None]) -> None:
    """Raise UserError, naming a weight, if values are NaN or infinite."""
    weights = (item for item in model.state_dict().items() if item[1].is_floating_point() and item[1].numel())
    broken = []
    for name, weight in weights:
        tick()
        if not is_finite(weight):
            broken.append(name)
    if broken:
        raise UserError(
            f"{path}: {len(broken)} weights have values that are NaN or infinite, such as {shown(broken[0])}: "
            "expected finite numbers; copy or convert the model again"
        )
