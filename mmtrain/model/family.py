"""The properties of a loaded model, determined once: its components, its head and how it takes images.

Properties that depend on the device and on what is trained are tried later: whether samples can share a row
(`packing_trial`) and whether image features can be cached (`image_cache`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmtrain.config.tune_section import ComponentModules
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.components import COMPONENTS, Components, base_name
from mmtrain.model.experts import expert_shares
from mmtrain.model.head import HeadKind, find_head_kind
from mmtrain.model.quantized_weights import num_weights
from mmtrain.model.vision_cost import image_attention

_NONE = ComponentModules()
_ONCE = dict.fromkeys(COMPONENTS, 1.0)


@dataclass(frozen=True, slots=True)
class Family:
    """The record of one loaded model."""

    components: Components
    head_kind: HeadKind
    grid_key: str | None = None
    """The name of the tensor with each image's patches in time, height and width, if there is one."""
    patches_per_token: float = 1.0
    """Patches of the vision tower for each placeholder in the text, measured on one image; 1 if unknown."""
    expert_shares: Mapping[str, float] = field(default_factory=dict)
    """By the name of a module with experts, the share of its weights that one token is multiplied with."""
    image_attention: tuple[float, float] = (0.0, 0.0)
    """Multiply-additions of one forward pass of the tower's attention: per pair of an image's patches, per patch."""

    def products(
        self, model: Any, passes: Mapping[str, float] = _ONCE, more: Callable[[nn.Parameter], float] = lambda _: 0.0
    ) -> dict[str, float]:
        """Multiply-additions of each component's linear layers and convolutions for one row: each weight as often as
        its component `passes`, and what `more` gives for it. Embedding tables cost none, and the head is left out; of
        experts those count that a row goes to."""
        tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        found, left_out = dict.fromkeys(COMPONENTS, 0.0), {self.components.head_name}
        for name, parameter in model.named_parameters():
            own, module = base_name(name), name.rpartition(".")[0]
            is_replaced = ".original_module." in name  # its trainable copy is counted
            is_computed = parameter.ndim >= 2 and module not in tables and own.rpartition(".")[0] not in left_out
            if is_computed and not is_replaced:
                component = self.components.component_of(own)
                share = next((s for owner, s in self.expert_shares.items() if own.startswith(f"{owner}.")), 1.0)
                found[component] += share * (passes[component] * num_weights(parameter) + more(parameter))
        return found


def probe_family(
    model: Any, processor: ChatProcessor, say: Callable[[str], None], named: ComponentModules = _NONE
) -> Family:
    """The record of `model`, as it was loaded: without adapters, in eval mode. `named`: what the config says of its
    components.

    If a slower head is used, `say` prints the reason in one line. Raises UserError if a component is not found.
    """
    patches, components = _patches_per_token(model.config, processor), Components(model, named)
    has_tower = bool(components.roots("vision"))
    return Family(
        components=components,
        head_kind=find_head_kind(model, say),
        grid_key=processor.grid_key,
        patches_per_token=patches,
        expert_shares=expert_shares(model),
        image_attention=image_attention(model, processor, patches, say) if has_tower else (0.0, 0.0),
    )


def _patches_per_token(config: Any, processor: ChatProcessor) -> float:
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    pixels = None if processor.images is None else processor.images.traits.pixels_per_token
    if patch is None or pixels is None:
        return 1.0
    return pixels / (math.prod(patch) if isinstance(patch, list | tuple) else patch**2)
