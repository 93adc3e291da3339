"""The cost of a sample: the multiply-additions of one training step. Micro-batches are balanced by it.

A linear layer with n weights takes n multiply-additions per token in the forward pass, and in the backward pass n for
its input and n for its weights (Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1:
2 C_forward = 2 N operations). Attention over n tokens takes 2 n² d per layer for scores and values, half of that if it
is causal, and twice as much backward; d is the width of all heads. The head, with vocabulary size times width weights,
is computed only where there is a label.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mmtrain.config.tune_section import Frozen, Tune
from mmtrain.model.family import Family
from mmtrain.model.kernels.last_layer import last_mlp
from mmtrain.model.quantized_weights import num_weights

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Multiply-additions of one sample's forward and backward pass."""

    token: float
    """Per token, image placeholders included."""
    token_pair: float
    """Per squared token of the sample."""
    image_token: float
    """Per placeholder: its patches in the vision tower."""
    image_token_pair: float
    """Per squared placeholder of each image."""
    supervised: float
    """Per supervised token: the head, and the last layer's MLP if it is computed only there."""

    @property
    def with_cached_features(self) -> "CostModel":
        """The costs when all image features are cached."""
        return replace(self, image_token=0.0, image_token_pair=0.0)

    def of(self, num_tokens: Any, num_image_tokens: Any, image_token_pairs: Any, num_supervised: Any = 0) -> Values:
        """(num_samples,) the cost of each sample."""
        language = self.token * num_tokens + self.token_pair * np.square(num_tokens, dtype=np.float64)
        images = self.image_token * num_image_tokens + self.image_token_pair * image_token_pairs
        return np.asarray(language + images + self.supervised * num_supervised)


def cost_model(model: Any, family: Family, tune: Tune) -> CostModel:
    """The costs in a model whose components are trained as `tune` says."""
    passes = _passes(tune)
    products = family.products(model, passes, _own)
    text, patches = model.config.get_text_config(), family.patches_per_token
    full, windows = family.image_attention
    attention = 1.0 if passes["vision"] == 1 else 3.0
    head, last = model.get_output_embeddings().weight, last_mlp(model)
    matrices = [] if last is None else [weight for weight in last.parameters() if weight.ndim >= 2]
    at_labels = sum(passes["language"] * num_weights(weight) + _own(weight) for weight in matrices)
    return CostModel(
        token=products["language"] - at_labels,
        token_pair=3.0 * sum(_width(text.per_layer_config[layer]) for layer in range(text.num_hidden_layers)),
        image_token=patches * (products["vision"] + windows * attention) + products["projector"],
        image_token_pair=full * patches**2 * attention,
        supervised=2.0 * head.numel() + _own(head) + at_labels,
    )


def _own(weight: nn.Parameter) -> float:
    """Multiply-additions of the weight's own gradient."""
    return float(weight.numel() * weight.requires_grad)


def _passes(tune: Tune) -> dict[str, float]:
    """How often each component's weights are multiplied: forward, and backward if gradients pass through them."""
    passes = {component: 1.0 if isinstance(mode, Frozen) else 2.0 for component, mode in tune.modes.items()}
    passes["language"] = 2.0
    passes["projector"] = max(passes["projector"], passes["vision"])
    return passes


def _width(config: Any) -> int:
    head, count = (getattr(config, key, None) for key in ("head_dim", "num_attention_heads"))
    return int(head * count if head and count else config.hidden_size)  # a recurrent family may name one of them
