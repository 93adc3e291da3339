"""LoRA adapters in peft's format: read from a directory, checked, and loaded completely into a model.

peft downloads from the hub if a directory is missing, reads pickle, runs any regex of a config, and only warns if the
weights do not fit. Here everything is checked before peft gets it.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, set_peft_model_state_dict
from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.config.schema import Model
from mmtrain.encoding.saved_processor import differences
from mmtrain.errors import UserError
from mmtrain.model.tune import peft_task
from mmtrain.safe_text import one_line, shown, visible
from mmtrain.text_files import json_object

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NAME = re.compile(r"[\w.-]+")
_PATTERN = re.compile(r"\^\(\?:(?:\w|\\[.-]|\|)+\)\$")
"""`^(?:a|b)$` with escaped names, as mmtrain writes it. Any other regex could run for hours."""

_RANKED = re.compile(r"\.lora_(?:embedding_)?A\b")
"""Names of weights whose first dimension is the rank."""


def _as_names(value: str | list[str]) -> str | list[str]:
    names = [value] if isinstance(value, str) else value
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("plain module names")
    return value


def _as_targets(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str) and _PATTERN.fullmatch(value):
        return value
    if isinstance(value, str) or not all(_NAME.fullmatch(name) for name in value):
        raise ValueError("a list of module names, or a pattern of plain names as mmtrain writes it, ^(?:a|b)$")
    return value


def _as_pattern_keys(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if not _NAME.fullmatch(key) and not _PATTERN.fullmatch(key):
            raise ValueError(f"module names as keys, not {shown(key)}")
    return value


_Names = Annotated[str | list[str], AfterValidator(_as_names)]
_Targets = Annotated[str | list[str], AfterValidator(_as_targets)]


class _Settings(BaseModel):
    """The keys of adapter_config.json that decide what an adapter computes."""

    model_config = ConfigDict(strict=True)

    r: PositiveInt
    lora_alpha: FiniteFloat
    target_modules: _Targets
    target_parameters: Annotated[list[str], AfterValidator(_as_names)] | None = None
    exclude_modules: _Targets | None = None
    modules_to_save: Annotated[list[str], AfterValidator(_as_names)] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Names | None = None
    rank_pattern: Annotated[dict[str, PositiveInt], AfterValidator(_as_pattern_keys)] = {}
    alpha_pattern: Annotated[dict[str, FiniteFloat], AfterValidator(_as_pattern_keys)] = {}
    use_rslora: bool = False
    use_dora: bool = False


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION", None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others change the base model's weights too
}
_WITHOUT_EFFECT = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout"}
"""Keys about where an adapter comes from or how it was trained."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was read and checked; whether it fits a model is not known yet."""

    folder: Path
    config: LoraConfig
    weights: dict[str, Tensor]
    """By the name in the file: float32, float16 or bfloat16, all finite."""


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in the directory `path`, or in `path/adapter` if `path` is the directory of a run.

    Raises UserError if there is none, or if it is broken, not LoRA, or not safe to load.
    """
    folder = find_adapter_folder(Path(path))
    weights = _read_weights(folder)
    return Adapter(folder, _read_config(folder / CONFIG, weights), weights)


def load_adapter(model: Any, adapter: Adapter, name: str = "default") -> PeftModel:
    """Load `adapter` into `model`, a base model or a PeftModel, on its device, and make it the active one. `model` is
    changed.

    Raises UserError unless every tensor of the file is in the model afterwards, and every weight of the adapter in the
    model came from the file.
    """
    device = model.device
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, adapter.config)
        else:
            wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[peft_task(model)]
            model = wrapper(model, adapter.config, adapter_name=name)
        loaded = set_peft_model_state_dict(model, adapter.weights, adapter_name=name)
    except KeyError as error:  # a module that was trained in full has no weights in the file
        raise UserError(f"{_file(adapter)}: {shown(error.args[0])} is missing") from None
    except (TypeError, ValueError, RuntimeError) as error:  # no such modules, of no use for LoRA, or of other shapes
        first = shown(next(iter(adapter.weights)), 120)
        raise UserError(
            f"{_file(adapter)}: the adapter does not fit the model, its first weight is {first}: {one_line(error, 200)}"
        ) from None
    _check_loaded(model, adapter, name, loaded.missing_keys, loaded.unexpected_keys)
    model.set_adapter(name, inference_mode=True)
    return model.to(device).eval()


def _check_loaded(model: Any, adapter: Adapter, name: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises UserError if the tensors of the file and the weights of the adapter in the model are not the same.

    In the model the name of every adapter weight contains the adapter's name; all other weights are the base model's.
    """
    file, keys = _file(adapter), model.state_dict().keys()
    own = {key for key in keys if f".{name}." in f"{key}." and (".lora_" in key or ".modules_to_save." in key)}
    extra = [*unexpected, *(key for key in adapter.weights if key in keys)]
    if extra:
        raise UserError(
            f"{file}: {len(extra)} of {len(adapter.weights)} tensors have no place in the model's adapter, such as "
            f"{shown(extra[0], 120)}: it was made for another model, or changes weights of the base model"
        )
    lost = sorted(own.intersection(missing))
    if lost:
        raise UserError(f"{file}: {len(lost)} of {len(own)} tensors are missing, such as {shown(lost[0], 120)}")
    if len(own) != len(adapter.weights):
        raise UserError(f"{file}: it has {len(adapter.weights)} tensors, but the model takes {len(own)}")


def _file(adapter: Adapter) -> str:
    return visible(str(adapter.folder / WEIGHTS))


def find_adapter(folder: Path) -> Path | None:
    """The directory of the adapter that `folder` is, or that the run in it saved; None where there is none."""
    return _with_file(folder, "adapter", CONFIG)


def find_model(folder: Path) -> Path | None:
    """The same for a model that was saved whole."""
    return _with_file(folder, "model", "config.json")


def complete_model(folder: Path) -> Path | None:
    """The same where there is no adapter."""
    return find_model(folder) if find_adapter(folder) is None else None


def say_other_processor(path: Path, model: Model, say: Callable[[str], None]) -> None:
    """Say in one line where the adapter or model of the run at `path` was trained with other chat templates or image
    settings than the section `model` of a config has. Raises UserError where one of them is broken."""
    folder = find_adapter(path) or find_model(path)
    if folder is not None and (found := differences(folder, model)):
        say(f"{visible(str(path))} was trained with another processor, and the config's is used: {'; '.join(found)}")


def _with_file(folder: Path, name: str, file: str) -> Path | None:
    both = (folder, folder / name)
    return next((one for one in both if os.path.isfile(one / file)), None)  # unlike Path.is_file it takes any name


def find_adapter_folder(path: Path) -> Path:
    """`path` or `path/adapter`, whichever has an adapter. Raises UserError if neither has one."""
    found = find_adapter(path)
    if found is not None:
        return found
    raise UserError(
        f"{visible(str(path))}: no adapter there, neither {CONFIG} nor adapter/{CONFIG}: "
        "give the directory of an adapter, or of a run that saved one"
    )


def named_base(adapter: Path) -> str | None:
    """The base model that the config of the adapter in a directory names, if it names one. Raises UserError where the
    config is broken."""
    file = adapter / CONFIG
    named = json_object(file, visible(str(file))).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    where = visible(str(file))
    if not os.path.isfile(file):
        found = f"only {PICKLE}, a pickle, which may run code" if os.path.exists(folder / PICKLE) else "not there"
        raise UserError(f"{where}: {found}: save the adapter as safetensors")
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: not a complete safetensors file: {one_line(error)}") from None
    for key, value in weights.items():
        if value.dtype not in _DTYPES:
            raise UserError(f"{where}: {shown(key, 120)} is {value.dtype}: expected float32, float16 or bfloat16")
        if not value.isfinite().all():
            raise UserError(f"{where}: {shown(key, 120)} is not finite: the adapter is broken")
    if not weights:
        raise UserError(f"{where}: it has no weights")
    return weights


def _read_config(file: Path, weights: dict[str, Tensor]) -> LoraConfig:
    where = visible(str(file))
    found = json_object(file, where)
    _check_others(where, found)
    try:
        settings = _Settings.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{where}: {_fault(error)}") from None
    _check_rank(where, settings, weights)
    try:
        task = found.get("task_type") or "CAUSAL_LM"
        return LoraConfig(**settings.model_dump(), task_type=task, inference_mode=True)
    except ValueError as error:  # two keys that exclude each other
        raise UserError(f"{where}: {one_line(error)}") from None


def _check_others(where: str, found: dict[str, Any]) -> None:
    """Raises UserError for a key with a value that is unknown, or that peft knows but mmtrain does not support."""
    defaults = LoraConfig().to_dict()
    known = _Settings.model_fields.keys() | _WITHOUT_EFFECT
    for key, value in found.items():
        if key in _ALLOWED and value not in _ALLOWED[key]:
            expected = " or ".join(map(repr, filter(None, _ALLOWED[key])))
            raise UserError(f"{where}: {key}: expected {expected}, not {shown(value)}")
        if key in known or key in _ALLOWED or value == defaults.get(key):
            continue
        if value not in (None, False, [], {}):
            raise UserError(f"{where}: {shown(key)} is not supported, but is set to {shown(value)}")
    if "peft_type" not in found:
        raise UserError(f"{where}: peft_type: required, but missing")


def _check_rank(where: str, settings: _Settings, weights: dict[str, Tensor]) -> None:
    """Raises UserError for a rank that no weight has: peft would allocate the memory for it first."""
    wanted = max([settings.r, *settings.rank_pattern.values()])
    largest = max((len(value) for key, value in weights.items() if _RANKED.search(key) and value.ndim), default=0)
    if wanted > largest:
        raise UserError(f"{where}: r or rank_pattern is {wanted}, but the rank of the weights is at most {largest}")


def _fault(error: ValidationError) -> str:
    item = error.errors()[0]
    key, message = str(item["loc"][0]), item["msg"]
    if item["type"] == "missing":
        return f"{key}: required, but missing"
    expected = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key}: expected {expected}, not {shown(item['input'])}"
