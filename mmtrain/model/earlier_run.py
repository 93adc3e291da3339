"""The trained weights of an earlier run as the first weights of a new one.

Every weight that was trained there must be trainable here: one that is frozen would be lost in what the new run saves,
which is made for the base model alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from mmtrain.config.schema import Model
from mmtrain.dataset.hashes import digest
from mmtrain.encoding.directory import files_in
from mmtrain.errors import UserError
from mmtrain.model.adapter import WEIGHTS, Adapter, complete_model, find_adapter_folder, named_base, read_adapter
from mmtrain.model.components import Components, base_name
from mmtrain.model.load import load_weights
from mmtrain.model.tower_components import SCALE
from mmtrain.model.tune import target_name
from mmtrain.safe_text import shown, visible

_KEY = "model.adapter"
_MERGE = "or merge it with `mmtrain merge` and give the merged model as model.path"


def trained_files(path: str) -> list[Path]:
    """The files with the trained weights of the run or adapter at `path`. Raises UserError if there are none."""
    model = complete_model(Path(path))
    return files_in(model, ["*.safetensors"]) if model is not None else [find_adapter_folder(Path(path)) / WEIGHTS]


def start_from_run(model: Any, components: Components, settings: Model, tick: Callable[[], None]) -> str:
    """Give the trainable weights of `model` the values that the run or adapter `settings.adapter` trained.

    `model` is what `apply_tune` gives. Weights that were not trained there keep their first values. Returns a line that
    says what was found. Raises UserError where a trained weight is not trainable here, has another shape, or would
    compute something else.
    """
    path = str(settings.adapter)
    complete = complete_model(Path(path))
    if complete is not None:
        num_loaded = _load_complete(model, components, settings, complete, tick)
    else:
        adapter = read_adapter(path)
        _check_base(adapter, settings.path)
        num_loaded = _load_adapter(model, adapter)
    num_trainable = sum(parameter.requires_grad for parameter in model.parameters())
    return f"started from {visible(path)}: {num_loaded} of {num_trainable} trainable tensors have its values"


def _load_complete(
    model: Any,
    components: Components,
    settings: Model,
    folder: Path,
    tick: Callable[[], None],
) -> int:
    """Copy the weights in which the model in `folder` differs from the base model; gives their number."""
    before, after = (
        dict(load_weights(str(one), settings.dtype, tick=tick).named_parameters()) for one in (settings.path, folder)
    )
    where = f"{_KEY}: {visible(str(folder))}"
    shapes = [{name: value.shape for name, value in one.items()} for one in (before, after)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{where}: its weights have other names or shapes than model.path: give the model of that run")
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    here = [(base_name(name), value) for name, value in model.named_parameters() if ".lora_" not in name]
    own = {name: value for name, value in here if value.requires_grad}
    values = dict(here)
    lost = [name for name in changed if name not in own and not _has(values, name, after[name])]
    if lost:
        component = components.component_of(lost[0])
        key = "objective.scale to trained" if component == SCALE else f"tune.{component}.mode to full"
        raise UserError(
            f"{where}: {len(lost)} weights that were trained there are not trained in full here, such as "
            f"{shown(lost[0], 120)}: set {key}, or give that directory as model.path"
        )
    loaded = [name for name in changed if name in own]
    for name in loaded:
        own[name].data.copy_(after[name])
    return len(loaded)


def _has(values: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    """Whether the weight `name` has this value already, such as a temperature that the config gives."""
    return name in values and torch.equal(values[name].to(value.device, value.dtype), value)


def _check_base(adapter: Adapter, path: str) -> None:
    """Raises UserError if the adapter was trained on a model with other weights, where that model is still there."""
    named = named_base(adapter.folder)
    if named is None or not Path(named).is_dir() or not Path(path).is_dir() or Path(named).samefile(path):
        return
    if digest(files_in(Path(named), ["*.safetensors"])) != digest(files_in(Path(path), ["*.safetensors"])):
        raise UserError(
            f"{_KEY}: {visible(str(adapter.folder))} was trained on {visible(named)}, whose weights are not those of "
            f"model.path: give that model, {_MERGE}"
        )


@torch.no_grad()
def _load_adapter(model: Any, adapter: Adapter) -> int:
    """Copy the tensors of `adapter` into those of `model`; gives their number."""
    where = f"{_KEY}: {visible(str(adapter.folder / WEIGHTS))}"
    if not isinstance(model, PeftModel):
        raise UserError(f"{where}: it is an adapter, and no component has mode lora here: set one to lora, {_MERGE}")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)  # by their names in a file
    lost = [name for name in adapter.weights if name not in own]
    if lost:
        raise UserError(
            f"{where}: {len(lost)} of {len(adapter.weights)} tensors are not trainable here, such as "
            f"{shown(lost[0], 120)}: give `tune` the components and targets of that run, {_MERGE}"
        )
    for name, value in adapter.weights.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{where}: {shown(name, 120)} has the shape {tuple(value.shape)}, and {tuple(own[name].shape)} here: "
                f"use the rank of that run, {_MERGE}"
            )
    _check_same_function(model, adapter, own.keys(), where)
    for name, value in adapter.weights.items():
        own[name].copy_(value)
    return len(adapter.weights)


def _check_same_function(model: PeftModel, adapter: Adapter, own: Iterable[str], where: str) -> None:
    """Raises UserError if a layer with weights of `adapter` would compute something else than it did in that run."""
    loaded = {_layer(name) for name in adapter.weights if ".lora_" in name}
    lost = [name for name in own if _layer(name) in loaded and name not in adapter.weights]
    if lost:
        raise UserError(f"{where}: {shown(lost[0], 120)} is missing: use the variant of that run, {_MERGE}")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in loaded:
            continue
        expected = _scaling(adapter.config, target_name(name, layer))
        if not math.isclose(layer.scaling["default"], expected, rel_tol=1e-6):
            raise UserError(
                f"{where}: its output is scaled by {expected:g} in {shown(name, 120)}, and by "
                f"{layer.scaling['default']:g} here: use the rank, alpha and variant of that run, {_MERGE}"
            )


def _layer(name: str) -> str:
    """The name of the layer that a tensor of an adapter belongs to."""
    return name.partition(".lora_")[0]


def _scaling(config: LoraConfig, name: str) -> float:
    """What the output of the adapter of the module `name` is multiplied by: alpha / rank, or alpha / sqrt(rank) with
    rsLoRA (Kalajdzievski 2023)."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
