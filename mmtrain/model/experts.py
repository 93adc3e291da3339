"""Mixtures of experts: weights that are stacks of one matrix for each expert, and how many of them a token meets."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_COUNT = re.compile(r"experts$")
"""Keys of a config with a number of experts."""


def numbers_of_experts(config: Any) -> set[int]:
    """How many experts the layers of a model with this configuration may have."""
    settings = config.get_text_config().to_dict()
    return {value for key, value in settings.items() if _COUNT.search(key) and type(value) is int and value > 1}


def expert_weights(modules: Mapping[str, nn.Module], config: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The stacks of matrices of experts in these modules, by name; no convolutions."""
    sizes = numbers_of_experts(config)
    for name, module in modules.items():
        if not isinstance(module, nn.modules.conv._ConvNd):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and len(parameter) in sizes:
                    yield f"{name}.{key}", parameter


@torch.no_grad()
def rows_of_a_token(model: Any, owners: Collection[str]) -> dict[str, int]:
    """For each of the modules `owners` that is called with a tensor as first argument, how many matrices of a stack one
    token is multiplied with: tried on one token. Empty where the model fails on it."""
    rows: dict[str, int] = {}

    def note(owner: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                chosen = [x for x in args[1:] if isinstance(x, Tensor) and not x.is_floating_point()]
                # either each row goes to the experts that are given for it, or there is a row for each expert
                rows[owner] = chosen[0].numel() if chosen else args[0].flatten(0, -2).shape[0]

        return hook

    if not owners:
        return rows
    hooks = [model.get_submodule(owner).register_forward_pre_hook(note(owner)) for owner in owners]
    token, device = torch.zeros(1, 1, dtype=torch.long, device=model.device), model.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    except Exception:  # a family that requires more than text can raise anything
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def expert_shares(model: Any) -> dict[str, float]:
    """By the name of a module with experts, the share of its matrices that one token is multiplied with; 1 where that
    is not known."""
    owners = {name.rpartition(".")[0]: len(p) for name, p in expert_weights(dict(model.named_modules()), model.config)}
    rows = rows_of_a_token(model, owners)
    return {owner: min(1.0, rows.get(owner, count) / count) for owner, count in owners.items()}
