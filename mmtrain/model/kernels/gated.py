"""Gated MLPs: the gate, its activation and the product in one pass.

A gated MLP is recognized by its structure, not by its name: two projections of the input and one back, or one whose
halves are gate and up; and an activation that is recognized by its values, or SiLU if no attribute is one. Which
projection is which is found by trial, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.kernels.linear import is_adapted_linear
from mmtrain.model.kernels.mlp import Gate
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.kernels.rowwise import GELU, GELU_TANH, QUICK_GELU, SILU, Activation, GatedActivation
from mmtrain.model.kernels.trial import Kernel, example_for

_ACTIVATIONS = (SILU, GELU, GELU_TANH, QUICK_GELU)


@dataclass(frozen=True)
class Gated(Kernel):
    """down(activation(gate(x)) * up(x))"""

    gate: Gate
    inputs: tuple[str, ...]
    """Names of the projections of the input: two, or one that gives gate and up as its halves."""
    down: str

    def compute(self, module: Any, x: Tensor) -> Tensor:
        gate, up = self.gate.split([getattr(module, name)(x) for name in self.inputs])
        gated = GatedActivation.apply(gate, up, self.gate.activation)  # type: ignore[no-untyped-call]
        return getattr(module, self.down)(gated)  # type: ignore[no-any-return]

    def example(self, module: Any) -> Tensor:
        return example_for(module, 1, ROW_MULTIPLE, getattr(module, self.inputs[0]).in_features)


def gated_kernels(module: nn.Module) -> Iterator[Gated]:
    """The kernels to try on `module`, which differ in which half is the gate; none if it is not a gated MLP."""
    linear = linear_children(module)
    if len(linear) not in (2, 3) or not has_only(module, linear):
        return
    for down in reversed(linear):  # the last one, nearly always
        inputs = tuple(name for name in linear if name != down)
        sizes = {(linear[name].in_features, linear[name].out_features) for name in inputs}
        inner = linear[down].in_features * (3 - len(inputs))
        if sizes == {(linear[down].out_features, inner)}:
            activation = find_activation(module) or SILU
            yield from (Gated(Gate(activation, up_first), inputs, down) for up_first in (False, True))


def linear_children(module: nn.Module) -> dict[str, Any]:
    """The linear layers of `module` by name, those with adapters too."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) or is_adapted_linear(child)
    }


def has_only(module: nn.Module, children: dict[str, Any]) -> bool:
    """Whether all parameters of `module` are of these children."""
    return _num_parameters(module) == sum(map(_num_parameters, children.values()))


def _num_parameters(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def find_activation(module: nn.Module) -> Activation | None:
    """The activation that a child or an attribute of `module` computes, if it is a known one."""
    children = [child for child in module.children() if not any(True for _ in child.parameters())]
    functions = [value for value in vars(module).values() if callable(value)]
    found = (activation for own in (*children, *functions) for activation in _ACTIVATIONS if _is(own, activation))
    return next(found, None)


def _is(function: Any, activation: Activation) -> bool:
    """Whether both give the same values. In float32 the two kinds of GELU differ by 5e-4."""
    numbers = torch.tensor([number / 8 for number in range(-48, 49)])  # has values also while a run is planned
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            return torch.allclose(function(numbers.clone()), activation.of(numbers), rtol=1e-5, atol=1e-6)
    except Exception:  # it is not an activation
        return False
