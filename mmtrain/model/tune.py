"""What is trainable in a model: all else is frozen, and adapters are added by peft."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper

from mmtrain.config.tune_section import Full, Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.components import Components, base_name
from mmtrain.model.lora_targets import Targets, patterns_are_rewritten, targets_of
from mmtrain.model.quantized_weights import num_weights
from mmtrain.safe_text import one_line


@dataclass(frozen=True, slots=True)
class ComponentReport:
    """One row of the table shown before the first step."""

    component: str
    mode: str
    num_modules: int
    trainable: int
    frozen: int
    quantized: int = 0
    """Those of the frozen weights that are stored in 4 bits."""
    roots: tuple[str, ...] = ()
    """The names of the modules that it was found in; none for a text-only model."""


def _pattern(names: list[str]) -> str:
    """One anchored pattern of literal names. peft would match a list as suffixes, also in other components."""
    return "^(?:" + "|".join(map(re.escape, names)) + ")$"


def apply_tune(model: Any, components: Components, tune: Tune) -> tuple[Any, list[ComponentReport]]:
    """Freeze all but what `tune` names, add the adapters, and cast trainable weights to float32.

    Returns the model to train (a PeftModel if any component has LoRA) and a report for each component. Raises UserError
    if the model lacks a component that is to be trained.
    """
    present = {components.component_of(name) for name, _ in model.named_parameters()}
    for component in tune.trainable:
        if component not in present:
            raise UserError(f"tune.{component}: the model has no {component} component: remove the key")
    loras = {component: mode for component, mode in tune.trainable.items() if isinstance(mode, Lora)}
    fulls = [component for component, mode in tune.trainable.items() if isinstance(mode, Full)]
    targets = {component: targets_of(model, components, component, lora) for component, lora in loras.items()}
    found = _never_trained(model, components) if fulls else {}
    never_trained = {name for component in fulls for name in found.get(component, ())}
    model.requires_grad_(False)
    if loras:
        saved = [name for component in fulls for name in components.largest_modules(model, component)]
        if "language" in fulls and model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                "tune.language: full next to LoRA elsewhere would untie the model's tied embeddings; "
                "choose lora, or set every trainable component to full"
            )
        model = _with_adapters(model, loras, targets, saved)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(components.component_of(name) in fulls)
    for name, parameter in model.named_parameters():
        if base_name(name) in never_trained:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, _report(model, components, tune, targets)


def _never_trained(model: Any, components: Components) -> dict[str, list[str]]:
    """By component, the parameters that the class of `model`, a base model, does not train, such as fixed positions.
    A new model without values shows them: transformers makes all weights trainable that it reads from a file."""
    with torch.device("meta"), torch.random.fork_rng([]):
        new = type(model)(deepcopy(model.config))
    found: dict[str, list[str]] = {}
    for name, parameter in new.named_parameters():
        if not parameter.requires_grad:
            found.setdefault(components.component_of(name), []).append(name)
    return found


def kept_frozen(model: Any, components: Components, tune: Tune) -> Iterator[str]:
    """Lines about weights of `model`, a base model, that stay frozen though their component is trained in full."""
    fulls = [component for component, mode in tune.trainable.items() if isinstance(mode, Full)]
    found = _never_trained(model, components) if fulls else {}
    for component in fulls:
        names = sorted(found.get(component, ()))
        if names:
            yield (
                f"tune.{component}: {len(names)} weights stay frozen, as in the model's own class: "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )


def _with_adapters(model: Any, loras: dict[str, Lora], targets: dict[str, Targets], saved: list[str]) -> PeftModel:
    """`model` with adapters on `targets` and a trainable copy of the modules `saved`. Raises UserError."""
    try:
        adapted = get_peft_model(model, _lora_config(model.config, loras, targets, saved, peft_task(model)))
    except (ValueError, NotImplementedError) as error:  # such as a layer that a family computes in its own kernel
        keys = ", ".join(f"tune.{component}" for component in loras)
        raise UserError(f"{keys}: peft refuses it: {one_line(error)}; name other layers in `targets`") from None
    assert isinstance(adapted, PeftModel)
    _check_made(adapted, targets)
    config = adapted.peft_config["default"]  # peft makes sets, whose order changes from run to run
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    if isinstance(config.target_parameters, set):
        config.target_parameters = sorted(config.target_parameters) or None
    return adapted


def peft_task(model: Any) -> str:
    """What peft calls the task of a base model: of one that generates text, or of an encoder."""
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"


def target_name(name: str, layer: LoraLayer) -> str:
    """What the adapter `layer` of a PeftModel, whose name there is `name`, is for: a name of `Targets`."""
    own = base_name(name)
    return f"{own}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else own


def _check_made(model: PeftModel, targets: dict[str, Targets]) -> None:
    """Raises UserError if peft has put adapters on others than `targets`."""
    wanted = {name for own in targets.values() for name in own}
    made = {target_name(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if made != wanted:
        names = ", ".join(sorted(made ^ wanted)[:3])
        raise UserError(
            f"tune.{', tune.'.join(targets)}: peft puts {len(made)} adapters on the model instead of {len(wanted)}, it "
            f"differs on {names}; name other layers in `targets`"
        )


def _lora_config(
    config: Any, loras: dict[str, Lora], targets: dict[str, Targets], saved: list[str], task: str
) -> LoraConfig:
    first = next(iter(loras.values()))
    names = {component: _pattern([*own]) for component, own in targets.items()}
    modules = [name for own in targets.values() for name in own.modules]
    return LoraConfig(
        task_type=task,
        target_modules=modules if not modules or patterns_are_rewritten(config) else _pattern(modules),
        target_parameters=[name for own in targets.values() for name in own.parameters] or None,
        modules_to_save=saved or None,
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=0.0,  # `install_dropout` adds dropout that does not depend on micro-batches
        use_rslora=first.variant == "rslora",
        use_dora=first.variant == "dora",
        rank_pattern={names[component]: lora.rank for component, lora in loras.items() if lora.rank != first.rank},
        alpha_pattern={names[component]: lora.alpha for component, lora in loras.items() if lora.alpha != first.alpha},
    )


def _report(model: Any, components: Components, tune: Tune, targets: dict[str, Targets]) -> list[ComponentReport]:
    rows = []
    for component, mode in tune.modes.items():
        own = [
            (name, p) for name, p in model.named_parameters() if components.component_of(base_name(name)) == component
        ]
        own = [(name, p) for name, p in own if ".original_module." not in name]
        if own:
            trainable = sum(p.numel() for _, p in own if p.requires_grad)
            total = sum(num_weights(p) for _, p in own)
            modules = targets.get(component, Targets()) or {
                base_name(name).rpartition(".")[0] for name, p in own if p.requires_grad
            }
            quantized = sum(num_weights(p) for _, p in own if hasattr(p, "quant_state"))
            counts = len(modules), trainable, total - trainable, quantized
            rows.append(ComponentReport(component, mode.mode, *counts, tuple(components.roots(component))))
    return rows
