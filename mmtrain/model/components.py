"""The three parts of a model (vision, projector, language) found on its module tree, and what learns of each.

The one place that knows how families name their parts.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from mmtrain.config.schema import Full, Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.lora_targets import is_linear, refused_by_peft
from mmtrain.safe_text import one_line

PARTS = ("vision", "projector", "language")
_INNER_PROJECTORS = ("merger", "merger_list", "deepstack_merger_list")
"""Children of a vision tower that belong to the projector: they turn its features into the language model's."""


class Components:
    """Which part each module and parameter of a base model belongs to."""

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
            depth = names[id(decoder)].count(".") + 2  # the decoder's child that the tower is in
            self._roots[".".join(names[id(vision)].split(".")[:depth])] = "projector"
        for name, module in _siblings(model, decoder, names):
            if name not in self._roots and any(True for _ in module.parameters()):
                self._roots[name] = "projector"

    def part_of(self, name: str) -> str:
        """The part of the module or parameter called `name` in the base model."""
        while name not in self._roots:
            name = name.rpartition(".")[0]
            if not name:
                return self._roots.get("", "language")
        return self._roots[name]

    def roots(self, part: str) -> list[str]:
        """Names of the modules that a part was found at; empty for a model of text alone."""
        return [name for name, own in self._roots.items() if own == part and name]

    def whole_modules(self, model: Any, part: str) -> list[str]:
        """Names of the largest modules that hold all of a part and nothing else (never a bare list of modules)."""
        return list(self._whole(model, "", part))

    def _whole(self, module: nn.Module, name: str, part: str) -> Iterator[str]:
        parts = {self.part_of(f"{name}.{inner}".strip(".")) for inner, _ in module.named_parameters()}
        if part not in parts:
            return
        if name and parts == {part} and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield name
            return
        if any(
            self.part_of(f"{name}.{inner}".strip(".")) == part for inner, _ in module.named_parameters(recurse=False)
        ):
            raise UserError(
                f"tune.{part}: {name or 'the model'} has weights of its own next to other components: "
                "it cannot be trained in full next to LoRA"
            )
        for inner, child in module.named_children():
            yield from self._whole(child, f"{name}.{inner}".strip("."), part)


def _vision_tower(model: Any) -> nn.Module | None:
    """The module that encodes pictures, None for a model of text alone."""
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
    """The modules beside the language model: whatever is not a known part belongs to the projector."""
    parent = names[id(decoder)].rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        yield f"{parent}.{name}".strip("."), module


@dataclass(frozen=True, slots=True)
class PartReport:
    """One row of the table shown before the first step."""

    part: str
    mode: str
    num_modules: int
    trainable: int
    frozen: int


def targets_of(model: Any, components: Components, part: str, lora: Lora) -> list[str]:
    """Names of the linear layers of a part that get an adapter. Raises UserError where there is none.

    Left out unless they are named: the head, because an adapter on it is rarely wanted and expensive in memory, and
    layers that peft refuses.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module) and components.part_of(name) == part]
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
        raise UserError(f"tune.{part}: {what}; the {part} part has: {found}")
    return chosen


def without_adapter(model: Any, components: Components, tune: Tune) -> Iterator[str]:
    """Lines about weights of `model`, a base model, that are multiplied and get no adapter though their component has
    LoRA without `targets`: layers that peft refuses, and experts, whose weights are stacks of matrices."""
    settings = model.config.get_text_config().to_dict()
    num_experts = {value for key, value in settings.items() if key.endswith("experts") and type(value) is int}
    for part, mode in tune.learning.items():
        if not isinstance(mode, Lora) or mode.targets is not None:
            continue
        own = [(name, module) for name, module in model.named_modules() if components.part_of(name) == part]
        refused = refused_by_peft(model.config, [name for name, module in own if is_linear(module)])
        if refused:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in refused}))
            yield f"tune.{part}: no adapter on {len(refused)} linear layers, which peft refuses in this family: {kinds}"
        stacks = [p for _, module in own for p in module.parameters(recurse=False) if p.ndim == 3]
        experts = [weight for weight in stacks if len(weight) in num_experts]
        if experts:
            size = sum(weight.numel() for weight in experts)
            yield (
                f"tune.{part}: no adapter on {len(experts)} weights of experts ({size:,} parameters): "
                "LoRA is put on linear layers alone"
            )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _pattern(names: list[str]) -> str:
    """One anchored pattern of literal names: a list of suffixes could match modules of other parts."""
    return "^(?:" + "|".join(map(re.escape, names)) + ")$"


def prepare_learning(model: Any, components: Components, tune: Tune) -> tuple[Any, list[PartReport]]:
    """Freeze all but what `tune` names, add the adapters, keep trainable weights in float32.

    Gives the model to train (a PeftModel if any component is LoRA) and a row a component for the table.
    Raises UserError where a component that should be trained has no module.
    """
    present = {components.part_of(name) for name, _ in model.named_parameters()}
    for part in tune.learning:
        if part not in present:
            raise UserError(f"tune.{part}: the model has no {part} part")
    loras = {part: mode for part, mode in tune.learning.items() if isinstance(mode, Lora)}
    fulls = [part for part, mode in tune.learning.items() if isinstance(mode, Full)]
    targets = {part: targets_of(model, components, part, lora) for part, lora in loras.items()}
    model.requires_grad_(False)
    if loras:
        saved = [name for part in fulls for name in components.whole_modules(model, part)]
        if "language" in fulls and model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                "tune.language: full next to LoRA elsewhere would untie the model's tied embeddings; "
                "choose lora, or set every trainable component to full"
            )
        try:
            model = get_peft_model(model, _lora_config(loras, targets, saved))
        except (ValueError, NotImplementedError) as error:  # such as a layer that a family computes in its own kernel
            parts = ", ".join(f"tune.{part}" for part in loras)
            raise UserError(f"{parts}: peft refuses: {one_line(error)}; name other layers in `targets`") from None
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(components.part_of(name) in fulls)
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
        lora_dropout=0.0,  # ours is put in by `install_dropout`: it must not depend on the cut
        use_rslora=first.variant == "rslora",
        use_dora=first.variant == "dora",
        rank_pattern={_pattern(targets[part]): lora.rank for part, lora in loras.items() if lora.rank != first.rank},
        alpha_pattern={
            _pattern(targets[part]): lora.alpha for part, lora in loras.items() if lora.alpha != first.alpha
        },
    )


_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+|\.lora_[^.]+\.[^.]+|\.lora_magnitude_vector\.[^.]+"
)


def base_name(name: str) -> str:
    """A parameter's name in the base model: what peft's wrappers add to it taken off."""
    return _WRAPPERS.sub("", name)


def is_as_loaded(model: Any, components: Components, parts: Collection[str]) -> bool:
    """Whether nothing of peft's was put into `parts` of `model`, a base model or one with adapters."""
    own = ((name.removeprefix("base_model.model."), base_name(name)) for name, _ in model.named_parameters())
    return not any(name != base and components.part_of(base) in parts for name, base in own)


def _report(model: Any, components: Components, tune: Tune, targets: dict[str, list[str]]) -> list[PartReport]:
    rows = []
    for part, mode in tune.parts.items():
        own = [(name, p) for name, p in model.named_parameters() if components.part_of(base_name(name)) == part]
        own = [(name, p) for name, p in own if ".original_module." not in name]
        if own:
            trainable = sum(p.numel() for _, p in own if p.requires_grad)
            modules = targets.get(part) or {base_name(name).rpartition(".")[0] for name, p in own if p.requires_grad}
            rows.append(
                PartReport(part, mode.mode, len(modules), trainable, sum(p.numel() for _, p in own) - trainable)
            )
    return rows
