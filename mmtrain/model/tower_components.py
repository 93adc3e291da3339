"""The components of a dual encoder, found in its module tree."""

from collections.abc import Collection
from typing import Any

from mmtrain.errors import UserError
from mmtrain.model.components import Components, base_name
from mmtrain.model.lora_targets import is_linear

SCALE = "scale"
"""The numbers of a dual encoder by which similarities are multiplied or moved: no component of `tune`."""


class TowerComponents(Components):
    """The components of a dual encoder: its image tower, its text tower (`language`), and what maps their outputs to
    embeddings (`projector`). Numbers of the model itself, such as its temperature, are `scale`."""

    def __init__(self, model: Any) -> None:
        self.head_name = ""
        text, vision = (
            _with_config(model, getattr(model.config, f"{name}_config", None)) for name in ("text", "vision")
        )
        self._roots = {"": "projector", text: "language", vision: "vision"}
        tower = model.get_submodule(text)
        self._roots |= {f"{text}.{name}": "projector" for name, child in tower.named_children() if is_linear(child)}
        self._roots |= {name: SCALE for name, value in model.named_parameters(recurse=False) if value.numel() == 1}

    def is_frozen(self, model: Any, names: Collection[str]) -> bool:
        """Whether no parameter of the components `names` is trainable. `model` can have adapters."""
        named = model.named_parameters()
        return not any(own.requires_grad and self.component_of(base_name(name)) in names for name, own in named)


def _with_config(model: Any, config: Any) -> str:
    """The name of the outermost module of `model` with a configuration of this kind."""
    found = [name for name, module in model.named_modules() if type(getattr(module, "config", None)) is type(config)]
    if config is None or not found:
        raise UserError("the towers of the model were not found: this family of models is not supported")
    return str(found[0])
