"""Tensors on the fake device, and what torch's Python module knows of it."""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from fake_cuda.kernels import KERNELS
from support.nested import changed, leaves

DEVICE = torch.device("cuda", 0)
_aten: Any = torch.ops.aten
_MOVES = {_aten._to_copy, _aten.copy_, _aten.set_, _aten.lift_fresh}
"""Operators that take tensors of two devices."""


class FakeTensor(torch.Tensor):
    """A tensor of the fake device. `content` has its values, on the CPU."""

    content: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor) -> "FakeTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
            storage_size=real.untyped_storage().nbytes(),
        )
        made.content = real
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the values: the wrapper's own has no address."""
        return self.content.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.content!r} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def _set_data(self, value: Tensor) -> None:
        """`self.data = value`, which torch does for tensors without a type of their own."""
        made = value.detach().requires_grad_(self.requires_grad)
        made.__dict__ |= {key: own for key, own in self.__dict__.items() if key != "content"}
        torch.utils.swap_tensors(self, made)  # type: ignore[no-untyped-call]

    data = property(lambda self: self.detach(), _set_data)


class FakeDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active tensors can be made on the fake device and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class ReadNumbers(TorchFunctionMode):
    """While it is active `torch.tensor` takes lists with tensors of the fake device, which it reads below Python's
    dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            args = changed(
                lambda value: value.item() if isinstance(value, FakeTensor) and not value.ndim else value, args
            )
        return func(*args, **kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _is_composite(func):
        return func.decompose(*args, **kwargs)  # made of others, which arrive here one by one
    given = leaves((args, kwargs))
    is_here = any(isinstance(leaf, FakeTensor) for leaf in given)
    if is_here and func.overloadpacket not in _MOVES:
        _refuse_others(func, given)
    device = kwargs.get("device")
    goes_here = is_here if device is None else torch.device(device).type == DEVICE.type
    generators = {leaf: _cpu_generator(leaf) for leaf in given if isinstance(leaf, torch.Generator)}

    def real(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return leaf.content
        if isinstance(leaf, torch.Generator):
            return generators[leaf]
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == DEVICE.type else leaf

    own_args, own_kwargs = changed(real, args), changed(real, kwargs)
    own_kwargs |= {"pin_memory": False} if goes_here and "pin_memory" in own_kwargs else {}
    kernel = KERNELS.get(func, func) if is_here else func
    out = kernel(*own_args, **own_kwargs)
    for generator, used in generators.items():
        generator.set_state(used.get_state())
    if not goes_here:
        is_copied = isinstance(out, Tensor) and any(out is leaf for leaf in leaves((own_args, own_kwargs)))
        return args[0] if is_copied else out
    out = changed(lambda value: FakeTensor(value) if isinstance(value, Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if is_here else out  # type: ignore[no-untyped-call]


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _refuse_others(func: Any, given: list[Any]) -> None:
    """As CUDA does: a tensor of the CPU among the device's own, unless it is a single number or an index."""
    for leaf in given:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            continue
        is_index = (
            func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_) and not leaf.is_floating_point()
        )
        if leaf.ndim and not is_index:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, cuda:0 and cpu were found")


def _cpu_generator(generator: torch.Generator) -> torch.Generator:
    made = torch.Generator()
    made.set_state(generator.get_state())
    return made


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Have torch's Python module report one such device; to be called once, in a process that has loaded it."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "a fake device",
        "get_device_capability": capability,
        "get_device_properties": SimpleNamespace(total_memory=2**34),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (2**34, 2**34),
        "set_device": None,
        "synchronize": None,
        "manual_seed_all": None,
        "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
