"""The components of a model: what each consists of, what LoRA adapts, and how it can be trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmtrain.config.tune_section import Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.components import COMPONENTS, Components
from mmtrain.model.load import model_structure
from mmtrain.model.lora_targets import targets_of
from mmtrain.model.tune import apply_tune

_LORA: dict[str, Any] = {"mode": "lora"}
_FULL: dict[str, Any] = {"mode": "full"}


@dataclass(frozen=True, slots=True)
class ComponentFound:
    """A component of the model. The adapters are those of LoRA without `targets`."""

    name: str
    modules: list[str]
    num_parameters: int
    num_adapted: int
    """Linear layers and weights of experts that get an adapter."""
    num_without_adapter: int
    """Parameters of everything else."""
    modes: dict[str, str | None]
    """For each way to train it, why `tune` refuses it; None where it does not."""


def find_components(path: str, model: Any, components: Components) -> Iterator[ComponentFound]:
    """The components of `model`, the base model in the directory `path`, in the order of `tune`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    present = [
        component for component in COMPONENTS if any(components.component_of(name) == component for name in sizes)
    ]
    for component in present:
        own = {name: size for name, size in sizes.items() if components.component_of(name) == component}
        adapted = _adapted(model, components, component)
        bare = [size for name, size in own.items() if not adapted & {name, name.rpartition(".")[0]}]
        others = [other for other in present if other != component and _adapted(model, components, other)]
        modes = {name: _refusal(path, tune) for name, tune in _tunes(component, others).items()}
        yield ComponentFound(component, components.roots(component), sum(own.values()), len(adapted), sum(bare), modes)


def _adapted(model: Any, components: Components, component: str) -> set[str]:
    """The names of what LoRA adapts in a component: linear layers, and weights of experts."""
    try:
        return set(targets_of(model, components, component, Lora(mode="lora")))
    except UserError:  # it has none
        return set()


def _tunes(component: str, others: list[str]) -> dict[str, dict[str, Any]]:
    """The ways to train a component: alone, and in full next to LoRA of another."""
    ways = {"lora": {component: _LORA}, "full": {component: _FULL}}
    return ways | ({"full next to lora": {component: _FULL, others[-1]: _LORA}} if others else {})


def _refusal(path: str, tune: dict[str, Any]) -> str | None:
    """Why `tune` is refused, tried on the model without its weights."""
    model = model_structure(path)
    try:
        apply_tune(model, Components(model), Tune.model_validate(tune))
    except UserError as error:
        return str(error)
    return None
