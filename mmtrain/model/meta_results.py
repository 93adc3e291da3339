"""What an operator gives on torch's meta device, which stores no values: shapes, types and what shares memory.

torch finds a shape in Python, which takes longer than a small computation. The layers of a model ask the same
questions again, so answers are remembered.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

META = torch.device("meta")


class MetaResults:
    """Calls operators with tensors on the meta device."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`."""
        if shares_memory(func) and not writes_first(func):
            return func(*args, **kwargs)
        try:
            key = func, _key(args), _key(kwargs)
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            self._known[key] = tree_map_only(Tensor, on_meta, out)
            return out
        return args[0] if writes_first(func) else tree_map_only(Tensor, on_meta, known)


@functools.cache
def shares_memory(func: Any) -> bool:
    """Whether the operator gives a view, or an argument that it writes to."""
    return any(one.alias_info is not None for one in func._schema.returns)


@functools.cache
def writes_first(func: Any) -> bool:
    """Whether the operator writes values into its first argument and gives that back."""
    arguments = enumerate(func._schema.arguments)
    written = [n for n, one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return written == [0] and len(func._schema.returns) == 1 and torch.Tag.inplace_view not in func.tags


def _key(value: Any) -> Any:
    """Equal for arguments that give results of the same shapes."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(own)) for name, own in value.items())
    return type(value), value


def on_meta(value: Tensor) -> Tensor:
    """A tensor of the same shape and type that stores nothing and shares nothing."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
