"""Tries kernels before they are used: a module must compute the same with and without them.

Random input goes forward and backward through the module, without its kernels and with them. The output, the gradient
of the input and the gradients of the trainable parameters are compared.
"""

import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.quantized_weights import dtype_of

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference (L2) that counts as rounding. If a module is tried alone, this is for each row of the
output and of the input's gradient; otherwise, and for the gradient of a parameter, for the whole tensor.

Measured on the families of `tests/test_kernels.py`: up to 5e-7 in float32 and 0.014 in bfloat16, which leaves a factor
of 20 and 4. Wrong formulas, in both types: SiLU instead of GELU 0.12, a subtracted mean 1, an epsilon added to the root
0.9. Formulas that differ by less, such as the two kinds of GELU (4e-5), are compared in float32 on separate values.
"""


class Kernel:
    """A replacement for a module's forward. Kernels are values: equal ones compute the same."""

    while_compiling: ClassVar[bool] = False
    """Whether torch.compile compiles the kernel, and not the module's own forward."""

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of `module`. If there is more than one argument, its own forward is called."""
        if kwargs or len(args) != 1 or (torch.compiler.is_compiling() and not self.while_compiling):
            return self.plain(module, *args, **kwargs)
        return self.compute(module, *args)

    def plain(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The same without the kernel."""
        return type(module).forward(module, *args, **kwargs)

    def compute(self, module: Any, x: Tensor) -> Tensor:
        """The same, faster."""
        raise NotImplementedError

    def example(self, module: Any) -> Tensor:
        """Random input for a trial of the kernel on `module` alone."""
        raise NotImplementedError


def kernel_of(module: nn.Module) -> Kernel | None:
    """The kernel that replaces the module's forward, if there is one."""
    found = getattr(vars(module).get("forward"), "__func__", None)
    return found if isinstance(found, Kernel) else None


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal random values, float32 on the CPU. torch's random state does not change."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example_for(module: nn.Module, *shape: int) -> Tensor:
    """`noise` with the device and type of the module's first parameter."""
    first = next(module.parameters())
    return noise(*shape).to(first.device, dtype_of(first))


def example_ids(decoder: Any) -> Tensor:
    """(1, ROW_MULTIPLE) random token ids for a trial of modules of `decoder`, on its device."""
    size = decoder.get_input_embeddings().num_embeddings
    ids = noise(1, ROW_MULTIPLE).abs().mul(1e6).long().remainder(size)
    return ids.to(next(decoder.parameters()).device)


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module."""


def first_calls(decoder: Any, names: Iterable[str]) -> dict[str, Call]:
    """The first call of each of these modules in one forward pass of `decoder` on random ids."""
    calls: dict[str, Call] = {}

    def saw(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(name, (args, kwargs))

    with ExitStack() as hooks:
        for name in names:
            hook = functools.partial(saw, name)
            hooks.enter_context(decoder.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        with undisturbed(decoder), torch.no_grad():
            decoder(input_ids=example_ids(decoder), use_cache=False)
    return calls


def layer_of(name: str) -> str:
    """`name` of a module up to and with its first number, which is that of its layer; all of it where it has none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return name if found is None else found[0]


class Trials:
    """Tries kernels, and installs those that pass. Modules of the same kind are tried once. `tick` is called after each
    trial, which can wait for a compiler."""

    def __init__(self, tick: Callable[[], None] = lambda: None) -> None:
        self._outcomes: dict[Any, bool] = {}
        self._tick = tick

    def install(
        self,
        whole: nn.Module,
        kernels: Mapping[str, Kernel],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Install `kernels` in the submodules of `whole` with these names ("" is `whole` itself), if `whole`, called
        with `args` and `kwargs`, then computes the same. If it does not, or raises, nothing changes and the result is
        False."""
        modules = {name: whole.get_submodule(name) for name in kernels}
        if any("forward" in vars(module) and kernel_of(module) is None for module in modules.values()):
            return False  # other code has replaced it
        key = (_kind(whole), tuple(kernels.items()))
        if key not in self._outcomes:
            self._outcomes[key] = _is_same(whole, kernels, args, kwargs or {})
            self._tick()
        if self._outcomes[key]:
            for name, module in modules.items():
                replace_forward(module, kernels[name])
        return self._outcomes[key]


def replace_forward(module: Any, kernel: Kernel) -> None:
    """Replace the module's forward by `kernel`."""
    module.forward = types.MethodType(kernel, module)


def _kind(whole: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that compute the same formula: everything but the values of their parameters."""
    return tuple(
        (name, type(module), kernel_of(module), tuple(_settings(module)), tuple(_shapes(module)))
        for name, module in whole.named_modules()
    )


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain attributes of the module itself, without the number of its layer."""
    plain = (bool, int, float, str)
    return ((key, value) for key, value in vars(module).items() if type(value) in plain and key != "layer_idx")


def _shapes(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """The shapes of the module's own parameters. A buffer can be part of the formula, so a module with one is tried by
    itself."""
    yield from ((key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False))
    yield from ((key, id(buffer)) for key, buffer in module.named_buffers(recurse=False))


def _is_same(whole: nn.Module, kernels: Mapping[str, Kernel], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        with undisturbed(whole):
            expected = _computed(whole, args, kwargs)
            with _replaced(whole, kernels):
                found = _computed(whole, args, kwargs)
        return _agree(found, expected, _TOLERANCE[_dtype(whole)], -1 if "" in kernels else None)
    except Exception:  # a module that the kernel is not meant for can raise anything
        return False


@contextmanager
def undisturbed(whole: nn.Module) -> Iterator[None]:
    """Inside, `whole` is in eval mode, with the autocast of a training step. Modes and random state are restored."""
    modes = {module: module.training for module in whole.modules()}
    device, dtype = next(whole.parameters()).device, _dtype(whole)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
        try:
            whole.train(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _dtype(whole: nn.Module) -> torch.dtype:
    """The type of the matrix products. Adapters are float32 even next to a 16-bit base."""
    dtypes = map(dtype_of, whole.parameters())
    return next((dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)), torch.float32)


@contextmanager
def _replaced(whole: nn.Module, kernels: Mapping[str, Kernel]) -> Iterator[None]:
    modules = {name: whole.get_submodule(name) for name in kernels}
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            replace_forward(module, kernels[name])
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                vars(module)["forward"] = before[name]


def _computed(whole: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor], Any]:
    """The structure of the output; its tensors and the gradient of the first input tensor; the gradients of the
    trainable parameters. Noise is added to the parameters, because adapters start as zeros."""
    weights = {name: _moved(p).requires_grad_() for name, p in whole.named_parameters() if p.requires_grad}
    leaves, form = tree_flatten((args, dict(kwargs)))
    first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    leaves[first] = leaves[first].detach().clone().requires_grad_()
    args, kwargs = tree_unflatten(leaves, form)
    with torch.enable_grad():
        given = torch.func.functional_call(whole, weights, args, dict(kwargs))
        out = [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        outer = [noise(*tensor.shape, seed=1).to(tensor) for tensor in out]
        with torch.autocast(leaves[first].device.type, enabled=False):  # as in a step
            to_input, *to_weights = torch.autograd.grad(
                out, [leaves[first], *weights.values()], outer, allow_unused=True
            )
    form = tree_map(lambda leaf: isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype), given)
    return form, [*out, to_input], to_weights


def _moved(parameter: nn.Parameter) -> Tensor:
    scale = 0.1 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
    return parameter.detach() + (noise(*parameter.shape) * scale).to(parameter)


def _agree(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float, dim: int | None) -> bool:
    """Whether both are the same except for rounding. A row of zeros proves nothing, so there may be none."""
    rows, gradients = [_rows(tensor) for tensor in expected[1]], expected[2]
    if found[0] != expected[0] or not all(tensor.any(-1).all() for tensor in rows):
        return False
    found_rows = [_rows(tensor) for tensor in found[1]]
    near_rows = all(_is_near(own, other, tolerance, dim) for own, other in zip(found_rows, rows, strict=True))
    return near_rows and all(_is_near(own, other, tolerance) for own, other in zip(found[2], gradients, strict=True))


def _rows(tensor: Tensor) -> Tensor:
    """The tensor without trailing dimensions of size 1, which images of one patch each have."""
    while tensor.ndim > 1 and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    return tensor


def _is_near(found: Tensor | None, expected: Tensor | None, tolerance: float, dim: int | None = None) -> bool:
    if found is None or expected is None:
        return found is expected
    own, other = found.detach().float(), expected.detach().float()
    distance, size = (torch.linalg.vector_norm(tensor, dim=dim) for tensor in (own - other, other))
    return bool((distance <= tolerance * size).all())
