"""What a sample costs to compute: the multiply-additions of one training step, by which micro-batches are balanced.

A linear layer of n weights takes n multiply-additions a token forward, n backward for its input and n for its weights
(Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1: 2 C_forward = 2 N operations). Attention
over n tokens takes 2 n² d a layer for scores and values, half of it where it is causal, and twice that backward.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.config.schema import Frozen, Full, Tune
from mmtrain.model.components import Components, base_name

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Multiply-additions of one sample's forward and backward pass."""

    token: float
    """Per token, pictures' placeholders counted."""
    token_pair: float
    """Per squared token of the sample."""
    image_token: float
    """Per placeholder: the patches behind it in the vision tower."""
    image_token_pair: float
    """Per squared placeholder of each picture."""

    def of(self, num_tokens: Any, num_image_tokens: Any, image_token_pairs: Any) -> Values:
        """(num_samples,) the cost of each."""
        language = self.token * num_tokens + self.token_pair * np.square(num_tokens, dtype=np.float64)
        return np.asarray(language + self.image_token * num_image_tokens + self.image_token_pair * image_token_pairs)


def cost_model(model: Any, components: Components, tune: Tune) -> CostModel:
    """The costs in a model whose parts learn as `tune` says."""
    weights = dict.fromkeys(("vision", "projector", "language"), 0)
    for name, parameter in model.named_parameters():
        own = base_name(name)
        if parameter.ndim >= 2 and "embed" not in own.rsplit(".", 2)[-2] and not own.startswith(components.head_name):
            weights[components.part_of(own)] += parameter.numel()
    config = model.config
    vision = getattr(config, "vision_config", None)
    passes = {
        part: 1.0 if isinstance(mode, Frozen) else 3.0 if isinstance(mode, Full) else 2.0
        for part, mode in tune.parts.items()
    }
    if passes["vision"] > 1:
        passes["projector"] = max(2.0, passes["projector"])  # gradients pass through it
    text = config.get_text_config()
    language_passes = max(2.0, passes["language"])
    depth, width = _depth(text), text.hidden_size
    patches = _patches_per_token(config)
    pair = 0.0
    if vision is not None:
        blocks = getattr(vision, "fullatt_block_indexes", None)
        pair = 2.0 * (_depth(vision) if blocks is None else len(blocks)) * vision.hidden_size * patches**2
    return CostModel(
        token=weights["language"] * language_passes,
        token_pair=3.0 * depth * width,
        image_token=weights["vision"] * patches * passes["vision"] + weights["projector"] * passes["projector"],
        image_token_pair=pair * (1.0 if passes["vision"] == 1 else 3.0),
    )


def _depth(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", None) or config.depth)


def _patches_per_token(config: Any) -> float:
    """Patches of the vision tower that become one token of the language model."""
    merge = getattr(config.vision_config, "spatial_merge_size", 1) if hasattr(config, "vision_config") else 1
    return float(int(merge) ** 2 * int(getattr(config, "scale_factor", None) or 1) ** 2)
