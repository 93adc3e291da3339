"""Which weights can have a LoRA adapter: found out, not known by family.

peft puts an adapter on a linear layer, or on a weight of any module (`target_parameters`): there the module computes
with the sum of weight and adapter. Experts, whose weights are stacks of matrices, need the second way, and so do linear
layers with a name under which peft looks for experts.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from mmtrain.config.tune_section import Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.components import Components
from mmtrain.model.experts import expert_weights, numbers_of_experts, rows_of_a_token
from mmtrain.model.quantized_weights import is_quantized, num_weights

_ROUTER = re.compile(r"router|gate$|gate\.")
"""Names of the layer that chooses experts, from its parent's name on."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What gets an adapter, by name in the base model."""

    modules: list[str] = field(default_factory=list)
    """Linear layers."""
    parameters: list[str] = field(default_factory=list)
    """Weights whose module computes with the sum of weight and adapter."""

    def __len__(self) -> int:
        return len(self.modules) + len(self.parameters)

    def __iter__(self) -> Iterator[str]:
        yield from self.modules
        yield from self.parameters


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes a linear layer and nothing else: routers of experts, for example, inherit from
    `nn.Linear` and return more than its output."""
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or is_quantized(module))


def targets_of(model: Any, components: Components, component: str, lora: Lora) -> Targets:
    """What gets an adapter in a component of `model`, a base model. Raises UserError if there is nothing.

    Some get one only if `targets` names them: the head, because an adapter on it is rarely useful and takes much
    memory, routers, and layers that peft refuses.
    """
    found = _Weights(model, components, component)
    if lora.targets is None:
        modules, weights, unknown = found.by_default, [*found.experts, *found.named_as_experts], []
    else:
        named = [*found.linear, *found.experts, *found.routers, *found.lost]
        chosen = {name for name in named if any(_ends_with(name, target) for target in lora.targets)}
        modules = [name for name in found.linear if name in chosen and name not in found.named_as_experts]
        weights = [name for name in (*found.experts, *found.named_as_experts, *found.routers) if name in chosen]
        unknown = [target for target in lora.targets if not any(_ends_with(name, target) for name in named)]
        lost = [name for name in found.lost if name in chosen]
        if lost:
            raise _not_loadable(component, lost, "name other layers in `targets`")
    parameters, left_out = _adapted(model, lora, map(found.weight_of, weights))
    if left_out and lora.targets is not None:
        raise UserError(
            f"tune.{component}.targets: {len(left_out)} weights cannot have an adapter, such as {left_out[0]}: "
            f"{_why_left_out(lora)}; name other layers in `targets`"
        )
    targets = Targets(modules, parameters)
    if not targets and found.lost:
        raise _not_loadable(component, found.lost, "set mode: full")
    if unknown or not targets:
        names = ", ".join(sorted({_last(name) for name in (*found.linear, *found.experts)})) or "none"
        what = f"no linear layer is called {', '.join(unknown)}" if unknown else "no layer gets LoRA by default"
        raise UserError(
            f"tune.{component}: {what}; the linear layers of {component} are: {names}; "
            "name some of them in `targets`, or set mode: full"
        )
    return targets


def _not_loadable(component: str, lost: list[str], remedy: str) -> UserError:
    return UserError(
        f"tune.{component}: peft would not load the adapters of {len(lost)} layers again, such as {lost[0]}: {remedy}"
    )


def without_adapter(model: Any, components: Components, tune: Tune) -> Iterator[str]:
    """Lines about weights of `model`, a base model, that are multiplied and get no adapter though their component has
    LoRA without `targets`."""
    for component, mode in tune.trainable.items():
        if not isinstance(mode, Lora) or mode.targets is not None:
            continue
        found = _Weights(model, components, component)
        for names, what in (
            (found.refused, "linear layers that peft refuses"),
            (found.lost, "layers that peft would not load again"),
        ):
            if names:
                kinds = ", ".join(sorted({_last(name) for name in names}))
                yield f"tune.{component}: no adapter on {len(names)} {what}: {kinds}"
        weights = [found.weight_of(name) for name in (*found.experts, *found.named_as_experts)]
        adapted, left_out = _adapted(model, mode, weights)
        if left_out:
            size, reason = sum(num_weights(model.get_parameter(name)) for name in left_out), _why_left_out(mode)
            yield f"tune.{component}: no adapter on {len(left_out)} weights of experts ({size:,} parameters): {reason}"
        if adapted and mode.dropout:
            yield (
                f"tune.{component}.dropout: not on {len(adapted)} weights of experts: their adapters are added to the "
                "weights, not to the outputs"
            )


class _Weights:
    """The weights of a component that can have an adapter, by what they are: names in the base model, of parameters for
    experts and of modules for all others."""

    def __init__(self, model: Any, components: Components, component: str) -> None:
        own = {name: m for name, m in model.named_modules() if name and components.component_of(name) == component}
        sizes = numbers_of_experts(model.config)
        self.linear = [name for name, module in own.items() if is_linear(module)]
        self.experts = [name for name, _ in expert_weights(own, model.config)]
        owners = {name.rpartition(".")[0] for name in self.experts}
        routers = [name for name, module in own.items() if name not in owners and _is_router(name, module, sizes)]
        self.routers = [name for name in routers if name not in self.linear]
        """Those that are no linear layers."""
        by_last = _ways(model.config, {_last(name) for name in self.linear})
        ways = {name: by_last[_last(name)] for name in self.linear}
        ways |= {name: None for name, way in ways.items() if way == "weight" and is_quantized(own[name])}
        layers = {name: name for name, way in ways.items() if way == "layer"}
        self.lost = _not_loaded_again(model, layers | {name: name.rpartition(".")[0] for name in self.experts})
        """Those that peft would not load again."""
        ways |= dict.fromkeys(layers.keys() & self.lost)
        self.experts = [name for name in self.experts if name not in self.lost]
        self.named_as_experts = [name for name, way in ways.items() if way == "weight"]
        self.refused = [name for name, way in ways.items() if way is None and name not in self.lost]
        left_out = {components.head_name, *routers}
        self.by_default = [name for name, way in ways.items() if way == "layer" and name not in left_out]

    def weight_of(self, name: str) -> str:
        """The name of the parameter that gets the adapter."""
        return name if name in self.experts else f"{name}.weight"


def _not_loaded_again(model: Any, owners: dict[str, str]) -> list[str]:
    """Those of the weights whose adapters peft would load under another name than it saves them: some rules that
    transformers has for the names of older checkpoints also match today's. `owners`: the module of each weight."""
    saved = {name: f"base_model.model.{owner}.lora_A.weight" for name, owner in owners.items()}
    tensors = dict.fromkeys(saved.values(), torch.empty(1, 1))
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(target_modules=[]), tensors)
    return [name for name, key in saved.items() if key not in loaded]


def _is_router(name: str, module: nn.Module, sizes: set[int]) -> bool:
    """Whether a module has one row of weights for each expert, and the name of a router."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.ndim != 2 or is_quantized(module) or len(weight) not in sizes:
        return False
    return _ROUTER.search(".".join(name.split(".")[-2:])) is not None


def _ways(config: Any, names: set[str]) -> dict[str, str | None]:
    """How peft puts adapters on linear layers of these names in a model with this configuration: on the "layer", only
    on its "weight", or, None, not at all, such as on a layer whose weight a recurrent family takes in a kernel of its
    own, where an adapter would have no effect."""
    if _num_made(config, names, LoraConfig(target_modules=sorted(names), r=1)) == len(names):
        return dict.fromkeys(names, "layer")
    if len(names) > 1:
        return {name: way for one in names for name, way in _ways(config, {one}).items()}
    by_weight = LoraConfig(target_modules=[], target_parameters=[f"{name}.weight" for name in names], r=1)
    return dict.fromkeys(names, "weight" if _num_made(config, names, by_weight) else None)


def _num_made(config: Any, names: Iterable[str], lora: LoraConfig) -> int:
    """How many adapters peft puts on a module with this configuration and layers of these names; 0 where it refuses.
    The random state does not change: the initial weights of the real adapters follow from it."""
    probe = nn.Module()
    object.__setattr__(probe, "config", config)
    with torch.random.fork_rng([]), warnings.catch_warnings(action="ignore"):
        for name in names:
            probe.add_module(name, nn.Linear(1, 1))
        try:
            inject_adapter_in_model(lora, probe)
        except ValueError:
            return 0
    return sum(isinstance(module, LoraLayer) for module in probe.modules())


def patterns_are_rewritten(config: Any) -> bool:
    """Whether peft makes a list of last names of a pattern of full names: it does where names have changed since
    adapters were trained with transformers 4."""
    lora = LoraConfig(target_modules="^(?:layer)$", r=1)
    _num_made(config, ["layer"], lora)
    return not isinstance(lora.target_modules, str)


def _adapted(model: Any, lora: Lora, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the parameters `names` that get an adapter, and those that cannot have one."""
    names = list(names)
    adapted = [] if lora.variant == "dora" else _run_alone(model, names)
    return adapted, [name for name in names if name not in adapted]


def _why_left_out(lora: Lora) -> str:
    return "peft has no DoRA for them" if lora.variant == "dora" else "their module does not run by itself"


def _run_alone(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the parameters `names` whose module is called with a tensor as first argument, as peft needs it. Where
    another module takes the weight out of it, an adapter would have no effect."""
    names = list(names)
    owners = {name.rpartition(".")[0] for name in names}
    layers = {owner for owner in owners if is_linear(model.get_submodule(owner))}
    alone = layers | rows_of_a_token(model, owners - layers).keys()
    return [name for name in names if name.rpartition(".")[0] in alone]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
