"""MLPs without a gate, down(activation(up(x))): the activation in one pass, and computed again for the backward pass.

Such an MLP is recognized by its structure and by the values of its activation, as gated ones are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.kernels.gated import find_activation, has_only, linear_children
from mmtrain.model.kernels.linear import is_adapted_linear
from mmtrain.model.kernels.products import ROW_MULTIPLE, product
from mmtrain.model.kernels.rowwise import Activation, activate, activate_gradient
from mmtrain.model.kernels.trial import Kernel, example_for


@dataclass(frozen=True)
class Ungated(Kernel):
    """down(activation(up(x)))"""

    activation: Activation
    up: str
    down: str

    def compute(self, module: Any, x: Tensor) -> Tensor:
        """The MLP of x (..., width). The rows that the module's `select_rows` leaves out are 0, or where no gradient is
        computed not a number: what depends on them shows it."""
        tokens, select = x.flatten(0, -2), getattr(module, "select_rows", None)
        if select is None:
            return self._of(module, tokens).view_as(x)
        rows = select(x)
        others = 0.0 if torch.is_grad_enabled() else torch.nan
        out = InRows.apply(self._of(module, tokens[rows]), rows, len(tokens), others)  # type: ignore[no-untyped-call]
        return out.view_as(x)  # type: ignore[no-any-return]

    def _of(self, module: Any, x: Tensor) -> Tensor:
        inner, down = getattr(module, self.up)(x), getattr(module, self.down)
        if is_adapted_linear(down) or inner.dtype != down.weight.dtype:
            return down(Activated.apply(inner, self.activation))  # type: ignore[no-untyped-call, no-any-return]
        return ActivatedProduct.apply(inner, down.weight, down.bias, self.activation)  # type: ignore[no-untyped-call, no-any-return]

    def example(self, module: Any) -> Tensor:
        return example_for(module, 1, ROW_MULTIPLE, getattr(module, self.up).in_features)


def ungated_kernels(module: nn.Module) -> Iterator[Ungated]:
    """The kernel to try on `module`; none if it is not an MLP of two linear layers with a known activation."""
    linear = linear_children(module)
    if len(linear) != 2 or not has_only(module, linear):
        return
    (up, first), (down, second) = linear.items()
    activation = find_activation(module)
    if activation and (first.in_features, first.out_features) == (second.out_features, second.in_features):
        yield Ungated(activation, up, down)


class Activated(torch.autograd.Function):
    """activation(x), (..., width)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activate(x, activation)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return activate_gradient(outer[0], x, ctx.activation), None


class ActivatedProduct(torch.autograd.Function):
    """activation(x) W' + b: (rows, out) from x (rows, in). The activation is computed again where W is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activation = activation
        return product(activate(x, activation), weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (x, weight), to_out, needs = ctx.saved_tensors, outer[0].contiguous(), ctx.needs_input_grad
        to_weight = to_out.t() @ activate(x, ctx.activation) if needs[1] else None
        to_x = activate_gradient(product(to_out, weight.t()), x, ctx.activation)
        return to_x, to_weight, to_out.sum(0) if needs[2] else None, None


class InRows(torch.autograd.Function):
    """(num_rows, width) with x in some rows, `at`, and a number in the others.

    Raises RuntimeError in the backward pass where another row has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, num_rows: int, others: float) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_full((num_rows, x.shape[-1]), others).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (at,) = ctx.saved_tensors
        if outer[0].index_fill(0, at, 0).any():
            raise RuntimeError("the embeddings depend on rows that were left out of an MLP: set run.kernels to off")
        return outer[0][at], None, None, None
