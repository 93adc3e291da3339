"""The three components of a model (vision, projector, language), found in its module tree, and what is trainable.

Only this module knows how families name their components.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from mmtrain.config.tune_section import Full, Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.lora_targets import is_linear, refused_by_peft
from mmtrain.model.quantized_weights import num_weights
from mmtrain.safe_text import one_line

COMPONENTS = ("vision", "projector", "language")
_INNER_PROJECTORS = ("merger", "merger_list", "deepstack_merger_list")
"""Children of a vision tower that belong to the projector: they map its features to the language model's."""


class Components:
    """The component of each module and parameter of a base model."""

    def __init__(self, model: Any) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        head, vision = model.get_output_embeddings(), _vision_tower(model)
        self.head_name = names[id(head)]
        self._roots: dict[str, str] = {"": "language"}
        if vision is None:
            return
        decoder = model.get_decoder()
        self._roots = {names[id(head)]: "language", names[id(decoder)]: "language", names[id(vision)]: "vision"}
        for name, _ in vision.named_children():
            if name in _INNER_PROJECTORS:
                self._roots[f"{names[id(vision)]}.{name}"] = "projector"
        if _is_inside(names[id(vision)], names[id(decoder)]):
            depth = names[id(decoder)].count(".") + 2  # the child of the decoder that the tower is in
            self._roots[".".join(names[id(vision)].split(".")[:depth])] = "projector"
        for name, module in _siblings(model, decoder, names):
            if name not in self._roots and any(True for _ in module.parameters()):
                self._roots[name] = "projector"

    def component_of(self, name: str) -> str:
        """The component of the module or parameter with this name in the base model."""
        while name not in self._roots:
            name = name.rpartition(".")[0]
            if not name:
                return self._roots.get("", "language")
        return self._roots[name]

    def roots(self, component: str) -> list[str]:
        """Names of the modules where the component was found; empty for a text-only model."""
        return [name for name, own in self._roots.items() if own == component and name]

    def largest_modules(self, model: Any, component: str) -> list[str]:
        """Names of the largest modules that together are the component and nothing else (never a bare ModuleList)."""
        return list(self._largest(model, "", component))

    def _largest(self, module: nn.Module, name: str, component: str) -> Iterator[str]:
        found = {self.component_of(f"{name}.{inner}".strip(".")) for inner, _ in module.named_parameters()}
        if component not in found:
            return
        if name and found == {component} and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield name
            return
        if any(
            self.component_of(f"{name}.{inner}".strip(".")) == component
            for inner, _ in module.named_parameters(recurse=False)
        ):
            raise UserError(
                f"tune.{component}: {name or 'the model'} has weights of its own next to other components: "
                "it cannot be trained in full next to LoRA"
            )
        for inner, child in module.named_children():
            yield from self._largest(child, f"{name}.{inner}".strip("."), component)


def _vision_tower(model: Any) -> nn.Module | None:
    """The module that encodes images, None for a text-only model."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    tower = model.get_encoder(modality="image")
    if tower is None or tower is model or tower is model.get_decoder():
        tower = next((m for m in model.modules() if getattr(m, "config", None) is model.config.vision_config), None)
    if tower is None:
        raise UserError("the model's vision tower was not found: this family of models is not supported")
    assert isinstance(tower, nn.Module)
    return tower


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _siblings(model: Any, decoder: nn.Module, names: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules next to the language model: those that are not a known component belong to the projector."""
    parent = names[id(decoder)].rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        yield f"{parent}.{name}".strip("."), module


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


def targets_of(model: Any, components: Components, component: str, lora: Lora) -> list[str]:
    """Names of the linear layers of a component that get an adapter. Raises UserError if there is none.

    Two kinds get one only if they are named: the head, because an adapter on it is rarely useful and takes much memory,
    and layers that peft refuses.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and components.component_of(name) == component
    ]
    if lora.targets is None:
        left_out = {components.head_name, *refused_by_peft(model.config, linear)}
        chosen = [name for name in linear if name not in left_out]
        unknown = []
    else:
        chosen = [name for name in linear if any(_ends_with(name, target) for target in lora.targets)]
        unknown = [target for target in lora.targets if not any(_ends_with(name, target) for name in linear)]
    if unknown or not chosen:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        what = f"no linear layer is called {', '.join(unknown)}" if unknown else "no linear layer was found"
        raise UserError(f"tune.{component}: {what}; the linear layers of {component} are: {found}")
    return chosen


def without_adapter(model: Any, components: Components, tune: Tune) -> Iterator[str]:
    """Lines about weights of `model`, a base model, that are multiplied and get no adapter though their component has
    LoRA without `targets`: layers that peft refuses, and experts, whose weights are stacks of matrices."""
    settings = model.config.get_text_config().to_dict()
    num_experts = {value for key, value in settings.items() if key.endswith("experts") and type(value) is int}
    for component, mode in tune.trainable.items():
        if not isinstance(mode, Lora) or mode.targets is not None:
            continue
        own = [(name, m) for name, m in model.named_modules() if components.component_of(name) == component]
        refused = refused_by_peft(model.config, [name for name, module in own if is_linear(module)])
        if refused:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in refused}))
            yield f"tune.{component}: no adapter on {len(refused)} linear layers that peft refuses: {kinds}"
        stacks = [p for _, module in own for p in module.parameters(recurse=False) if p.ndim == 3]
        experts = [weight for weight in stacks if len(weight) in num_experts]
        if experts:
            size = sum(num_weights(weight) for weight in experts)
            yield (
                f"tune.{component}: no adapter on {len(experts)} weights of experts ({size:,} parameters): "
                "LoRA is put on linear layers alone"
            )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


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
    model.requires_grad_(False)
    if loras:
        saved = [name for component in fulls for name in components.largest_modules(model, component)]
        if "language" in fulls and model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                "tune.language: full next to LoRA elsewhere would untie the model's tied embeddings; "
                "choose lora, or set every trainable component to full"
            )
        try:
            model = get_peft_model(model, _lora_config(loras, targets, saved))
        except (ValueError, NotImplementedError) as error:  # such as a layer that a family computes in its own kernel
            keys = ", ".join(f"tune.{component}" for component in loras)
            raise UserError(f"{keys}: peft refuses it: {one_line(error)}; name other layers in `targets`") from None
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(components.component_of(name) in fulls)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, _report(model, components, tune, targets)


def _lora_config(loras: dict[str, Lora], targets: dict[str, list[str]], saved: list[str]) -> LoraConfig:
    first = next(iter(loras.values()))
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=_pattern([name for names in targets.values() for name in names]),
        modules_to_save=saved or None,
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=0.0,  # `install_dropout` adds dropout that does not depend on micro-batches
        use_rslora=first.variant == "rslora",
        use_dora=first.variant == "dora",
        rank_pattern={
            _pattern(targets[component]): lora.rank for component, lora in loras.items() if lora.rank != first.rank
        },
        alpha_pattern={
            _pattern(targets[component]): lora.alpha for component, lora in loras.items() if lora.alpha != first.alpha
        },
    )


_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+|\.lora_[^.]+\.[^.]+|\.lora_magnitude_vector\.[^.]+"
)


def base_name(name: str) -> str:
    """A parameter's name in the base model: without what peft's wrappers add."""
    return _WRAPPERS.sub("", name)


def is_as_loaded(model: Any, components: Components, names: Collection[str]) -> bool:
    """Whether the components `names` have no adapters or copies by peft. `model` is a base model or a PeftModel."""
    own = ((name.removeprefix("base_model.model."), base_name(name)) for name, _ in model.named_parameters())
    return not any(name != base and components.component_of(base) in names for name, base in own)


def _report(model: Any, components: Components, tune: Tune, targets: dict[str, list[str]]) -> list[ComponentReport]:
    rows = []
    for component, mode in tune.components.items():
        own = [
            (name, p) for name, p in model.named_parameters() if components.component_of(base_name(name)) == component
        ]
        own = [(name, p) for name, p in own if ".original_module." not in name]
        if own:
            trainable = sum(p.numel() for _, p in own if p.requires_grad)
            total = sum(num_weights(p) for _, p in own)
            modules = targets.get(component) or {
                base_name(name).rpartition(".")[0] for name, p in own if p.requires_grad
            }
            quantized = sum(num_weights(p) for _, p in own if hasattr(p, "quant_state"))
            rows.append(ComponentReport(component, mode.mode, len(modules), trainable, total - trainable, quantized))
    return rows
