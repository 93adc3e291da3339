"""AdamW over the components' parameters, and the learning rate as a function of the step alone."""

import math
from typing import Any

import torch

from mmtrain.config.schema import Config
from mmtrain.model.components import Components, base_name


def rate_factor(step: int, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the highest rate used in `step`, counted from 1.

    Rises linearly to 1 at step `warmup_steps`; the first step after it is at 1, and the step after the last would be
    at 0 (cosine: half a period, Loshchilov and Hutter 2017, without restarts).
    """
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def make_optimizer(model: Any, components: Components, config: Config) -> torch.optim.AdamW:
    """AdamW with two groups for each component, matrices and the rest: weight decay applies to matrices only."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((components.component_of(base_name(name)), parameter.ndim >= 2), []).append(parameter)
    own_rates = {component: mode.learning_rate for component, mode in config.tune.trainable.items()}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base_rate": own_rates.get(component) or config.train.learning_rate,
                "weight_decay": config.train.weight_decay if is_matrix else 0.0,
            }
            for (component, is_matrix), parameters in groups.items()
        ],
        lr=config.train.learning_rate,
    )


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor
