"""Values in nested tuples, lists and dicts, as torch's operators take and give them.

`torch.utils._pytree` does the same for any class, and takes half the time of a model whose every operator is watched.
"""

from collections.abc import Callable
from typing import Any


def leaves(value: Any) -> list[Any]:
    """The values in `value`, in order."""
    kind = type(value)
    if kind is dict:
        value = list(value.values())
    elif kind is not tuple and kind is not list:
        return [value]
    return [leaf for one in value for leaf in leaves(one)]


def changed(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` of each value in it."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([changed(change, one) for one in value])
    if kind is dict:
        return {key: changed(change, one) for key, one in value.items()}
    return change(value)
