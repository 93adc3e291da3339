"""Fuses the MLPs of a language model's layers with the normalization before them and their adapters.

One forward pass of the decoder shows which normalization gives the input of an MLP. A trial of the smallest module that
contains both shows that nothing else uses its result.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from mmtrain.model.dropout import mask_of
from mmtrain.model.kernels.gated import Gated
from mmtrain.model.kernels.last_layer import compute_at_predicting, rows_of
from mmtrain.model.kernels.linear import is_frozen
from mmtrain.model.kernels.mlp import NormedMLP, Projection
from mmtrain.model.kernels.norms import RMSNorm
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.kernels.trial import Call, Kernel, Trials, example_ids, first_calls, kernel_of, layer_of, undisturbed


@dataclass(frozen=True)
class ComputedByMLP(Kernel):
    """A normalization that the MLP after it computes."""

    while_compiling: ClassVar[bool] = True
    norm: RMSNorm

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Fused(Kernel):
    """A gated MLP of frozen layers and their adapters, and the normalization before it if there is one."""

    gated: Gated
    norm: RMSNorm | None = None
    norm_module: Any = field(default=None, compare=False)

    def plain(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.norm is not None:
            args = (self.norm.plain(self.norm_module, *args, **kwargs),)
            kwargs = {}
        return super().plain(module, *args, **kwargs)

    def compute(self, module: Any, x: Tensor) -> Tensor:
        """The MLP of x, (..., width)."""
        tokens, rows = x.flatten(0, -2), rows_of(module)
        names = (*self.gated.inputs, self.gated.down)
        projections = [_projection(getattr(module, name), len(tokens), rows) for name in names]
        tensors = [tensor for projection in projections for tensor in projection.tensors]
        adapters = [(projection.scaling, projection.mask) for projection in projections]
        own = tokens if rows is None else tokens[rows]
        weight, eps = (None, 0.0) if self.norm is None else (self.norm.weight(self.norm_module), self.norm.eps)
        out = NormedMLP.apply(own, weight, eps, self.gated.gate, adapters, *tensors)  # type: ignore[no-untyped-call]
        if rows is not None:
            out = torch.zeros_like(tokens).index_copy(0, rows, out)
        return out.view_as(x)  # type: ignore[no-any-return]

    def example(self, module: Any) -> Tensor:
        return self.gated.example(module)


def _projection(module: Any, num_rows: int, selected: Tensor | None) -> Projection:
    """For `selected` of `num_rows` rows."""
    if not isinstance(module, LoraLinear):
        return Projection(module.weight, module.bias)
    base, (name,) = module.get_base_layer(), module.active_adapters
    if module.disable_adapters or module.merged:
        return Projection(base.weight, base.bias)
    mask = mask_of(module.lora_dropout[name], num_rows)
    return Projection(
        base.weight,
        base.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
        None if mask is None else mask.at(selected),
    )


def fuse_mlps(decoder: Any, trials: Trials) -> None:
    """Fuse the gated MLPs of `decoder`, each with the norm before it or, if that fails its trial, alone."""
    mlps = [name for name, module in decoder.named_modules() if _can_be_fused(module)]
    if not mlps:
        return
    try:
        run = _TrialRun(decoder, mlps)
    except Exception:  # the decoder requires more than ids
        return
    for name in run.order:
        if not _fuse_with_norm(run, name, trials):
            mlp = decoder.get_submodule(name)
            kernel = Fused(_gated(mlp))
            trials.install(mlp, {"": kernel}, (kernel.example(mlp),))
    for name in run.order[-1:]:
        last, layer = decoder.get_submodule(name), layer_of(name)
        if layer != name and isinstance(kernel_of(last), Fused) and run.is_needed_by_row(last):
            compute_at_predicting(decoder.get_submodule(layer), last)


def _can_be_fused(module: nn.Module) -> bool:
    kernel = kernel_of(module)
    names = (*kernel.inputs, kernel.down) if isinstance(kernel, Gated) else ()
    return bool(names) and all(is_frozen(module.get_submodule(name)) for name in names)


def _gated(mlp: nn.Module) -> Gated:
    kernel = kernel_of(mlp)
    assert isinstance(kernel, Gated)
    return kernel


def _fuse_with_norm(run: "_TrialRun", name: str, trials: Trials) -> bool:
    norm_name = run.norm_before.get(name)
    if norm_name is None:
        return False
    mlp, norm = (run.decoder.get_submodule(module) for module in (name, norm_name))
    parent, rms = _common_parent(name, norm_name), kernel_of(norm)
    if parent not in run.calls or not isinstance(rms, RMSNorm):
        return False
    kernels = {name: Fused(_gated(mlp), rms, norm), norm_name: ComputedByMLP(rms)}
    inner = {own.removeprefix(f"{parent}."): kernel for own, kernel in kernels.items()}
    return trials.install(run.decoder.get_submodule(parent), inner, *run.calls[parent])


def _common_parent(name: str, other: str) -> str:
    """The name of the smallest module that contains both."""
    while not other.startswith(f"{name}."):
        name = name.rpartition(".")[0]
        if not name:
            break
    return name


class _TrialRun:
    """One forward pass of the decoder on random ids: the order of its MLPs that are called once, and their inputs."""

    def __init__(self, decoder: Any, mlps: list[str]) -> None:
        self.decoder = decoder
        self.order: list[str] = []
        self.norm_before: dict[str, str] = {}
        """For each MLP the norm that gave its input and was called only once."""
        around = {name.rsplit(".", i)[0] for name in mlps for i in range(1, name.count(".") + 1)}
        self._given: dict[int, tuple[str, Tensor]] = {}
        """The results of the norms, by identity."""
        self._count: Counter[str] = Counter()
        self._ids = example_ids(decoder)
        self.calls = self._watch(mlps, around)
        """Those of the modules around the MLPs."""

    def is_needed_by_row(self, mlp: nn.Module) -> bool:
        """Whether each row of the decoder's output depends only on the same row of the output of `mlp`."""
        rows = [ROW_MULTIPLE // 4, ROW_MULTIPLE // 2]
        kept = torch.zeros_like(self._ids).index_fill(1, torch.tensor(rows, device=self._ids.device), 1)
        handle = mlp.register_forward_hook(lambda module, args, out: out * kept[..., None])
        try:
            found = self._hidden()[:, rows]
        finally:
            handle.remove()
        return torch.equal(found, self._hidden()[:, rows])

    def _hidden(self) -> Tensor:
        """(1, ROW_MULTIPLE, width)"""
        with undisturbed(self.decoder), torch.no_grad():
            return self.decoder(input_ids=self._ids, use_cache=False)[0]  # type: ignore[no-any-return]

    def _watch(self, mlps: list[str], around: set[str]) -> dict[str, Call]:
        """The calls of the modules `around`, in the forward pass that shows the order and the norms."""
        norms = [name for name, module in self.decoder.named_modules() if isinstance(kernel_of(module), RMSNorm)]
        with ExitStack() as hooks:
            for names, hook in ((norms, self._saw_norm), (mlps, self._saw_mlp)):
                for name in names:
                    module = self.decoder.get_submodule(name)
                    hooks.enter_context(module.register_forward_hook(partial(hook, name), with_kwargs=True))
            calls = first_calls(self.decoder, around)
        self.order = [name for name in self.order if self._count[name] == 1]
        self.norm_before = {mlp: norm for mlp, norm in self.norm_before.items() if self._count[norm] == 1}
        return calls

    def _saw_norm(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        self._count[name] += 1
        self._given[id(out)] = name, out

    def _saw_mlp(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        self._count[name] += 1
        self.order.append(name)
        if args and id(args[0]) in self._given:
            self.norm_before[name] = self._given[id(args[0])][0]
