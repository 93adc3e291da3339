"""The three components of a model (vision, projector, language), found in its module tree.

Only this module knows how families name their components.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from mmtrain.config.tune_section import ComponentModules
from mmtrain.errors import UserError
from mmtrain.safe_text import shown

COMPONENTS = ("vision", "projector", "language")
_INNER_PROJECTORS = ("merger", "merger_list", "deepstack_merger_list", "patch_merger")
"""Children of a vision tower that belong to the projector: they map its features to the language model's."""
_NONE = ComponentModules()


class Components:
    """The component of each module and parameter of a base model."""

    def __init__(self, model: Any, named: ComponentModules = _NONE) -> None:
        """`named`: what belongs to another component than the one it is found in, and the vision tower where none is
        found. Raises UserError where the model has no module or parameter of such a name, or no vision tower."""
        by_name = _by_component(model, named)
        names = {id(module): name for name, module in model.named_modules()}
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"{type(model).__name__} does not say which module is its head: get_output_embeddings() gives none; "
                "this family is not supported"
            )
        self.head_name = names[id(head)]
        self._roots: dict[str, str] = {"": "language"}
        if _vision_config(model.config) is not None:
            self._find(model, _vision_tower(model, named), names)
        self._roots |= by_name

    def _find(self, model: Any, vision: nn.Module | None, names: dict[int, str]) -> None:
        head = model.get_output_embeddings()
        decoder = decoder_of(model)
        self._roots = {names[id(head)]: "language", names[id(decoder)]: "language"}
        if vision is not None:
            self._add_tower(names[id(vision)], vision, names[id(decoder)])
        towers = [getattr(model.config, key, None) for key in model.config.sub_configs if "vision" in key]
        for name, module in _siblings(model, decoder, names):
            if name not in self._roots and any(True for _ in module.parameters()):
                is_tower = any(config is getattr(module, "config", model) for config in towers)
                self._roots[name] = "vision" if is_tower else "projector"

    def _add_tower(self, name: str, vision: nn.Module, decoder: str) -> None:
        self._roots[name] = "vision"
        for child, _ in vision.named_children():
            if child in _INNER_PROJECTORS:
                self._roots[f"{name}.{child}"] = "projector"
        if _is_inside(name, decoder):
            depth = decoder.count(".") + 2  # the child of the decoder that the tower is in
            self._roots.setdefault(".".join(name.split(".")[:depth]), "projector")

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
                "it cannot be trained in full next to LoRA; choose lora, or set every trainable component to full"
            )
        for inner, child in module.named_children():
            yield from self._largest(child, f"{name}.{inner}".strip("."), component)


def decoder_of(model: Any) -> Any:
    """The language model without its head. Some families call the head `decoder`, and then `get_decoder` gives it."""
    found = model.get_decoder()
    return model.base_model if found is model.get_output_embeddings() else found


def _by_component(model: Any, named: ComponentModules) -> dict[str, str]:
    """The component of each name that the config gives. Raises UserError for a name that the model does not have."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
    by_name = {name: component for component in COMPONENTS for name in getattr(named, component)}
    for name, component in by_name.items():
        if name not in known:
            near = difflib.get_close_matches(name[:200], sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(shown, near))}?" if near else "mmtrain inspect-model shows some"
            raise UserError(f"tune.components.{component}: the model has no module called {shown(name, 120)}; {hint}")
    return by_name


def _vision_tower(model: Any, named: ComponentModules) -> nn.Module | None:
    """The module that encodes images; None where no module but the language model has layers, so pixels are only
    projected."""
    config = _vision_config(model.config)
    tower = model.get_encoder(modality="image")
    if tower is None or tower is model or tower is decoder_of(model):
        tower = next((m for m in model.modules() if getattr(m, "config", None) is config), None)
    if tower is None and named.vision:
        tower = model.get_submodule(named.vision[0])
    if tower is None:
        names = {id(module): name for name, module in model.named_modules()}
        decoder = decoder_of(model)
        others = {name: module for name, module in _siblings(model, decoder, names) if module is not decoder}
        if not any(isinstance(inner, nn.ModuleList) for module in others.values() for inner in module.modules()):
            return None
        raise UserError(
            "the model's vision tower was not found: name its modules in tune.components, such as "
            f"tune.components='{{vision: [{next(iter(others))}]}}'"
        )
    assert isinstance(tower, nn.Module)
    return tower


def _vision_config(config: Any) -> Any:
    """That of the module that encodes images; where none is called so, the first that is of neither text nor sound."""
    own = getattr(config, "vision_config", None)
    if own is not None or not hasattr(config, "image_token_id"):
        return own
    others = (getattr(config, key) for key in config.sub_configs if not re.search("text|audio", key))
    return next(others, None)


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _siblings(model: Any, decoder: nn.Module, names: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules next to the language model: those that are no further vision tower belong to the projector."""
    parent = names[id(decoder)].rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        yield f"{parent}.{name}".strip("."), module


_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+|\.lora_[^.]+\.[^.]+|\.lora_magnitude_vector\.[^.]+"
)


def base_model(model: Any) -> Any:
    """`model` without the wrapper of its adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_name(name: str) -> str:
    """A parameter's name in the base model: without what peft's wrappers add."""
    return _WRAPPERS.sub("", name)


def is_as_loaded(model: Any, components: Components, names: Collection[str]) -> bool:
    """Whether the components `names` have no adapters or copies by peft. `model` is a base model or a PeftModel."""
    own = ((name.removeprefix("base_model.model."), base_name(name)) for name, _ in model.named_parameters())
    return not any(name != base and components.component_of(base) in names for name, base in own)
