"""What a sample costs to compute: the multiply-additions of one training step, by which micro-batches are balanced.

A linear layer of n weights takes n multiply-additions a token forward, n backward for its input and n for its weights
(Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1: 2 C_forward = 2 N operations). Attention
over n tokens takes 2 n² d a layer for scores and values, half of it where it is causal, and twice that backward; d is
the width of all heads. The head, vocabulary times width weights, is computed where there is a label, nowhere else.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mmtrain.config.schema import Frozen, Tune
from mmtrain.model.components import Components, base_name
from mmtrain.model.family import Family
from mmtrain.model.kernels.last_layer import last_mlp

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
    supervised: float
    """Per learned token: the head, and the last layer's MLP where it is left out elsewhere."""

    @property
    def with_kept_features(self) -> "CostModel":
        """The costs where nothing is computed for pictures."""
        return replace(self, image_token=0.0, image_token_pair=0.0)

    def of(self, num_tokens: Any, num_image_tokens: Any, image_token_pairs: Any, num_supervised: Any = 0) -> Values:
        """(num_samples,) the cost of each."""
        language = self.token * num_tokens + self.token_pair * np.square(num_tokens, dtype=np.float64)
        pictures = self.image_token * num_image_tokens + self.image_token_pair * image_token_pairs
        return np.asarray(language + pictures + self.supervised * num_supervised)


def cost_model(model: Any, family: Family, tune: Tune) -> CostModel:
    """The costs in a model whose components are trained as `tune` says."""
    products, passes = _products(model, family.components, tune), _passes(tune)
    config = model.config
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    patches = family.patches_per_token
    whole, windows = (0.0, 0.0) if vision is None else _picture_attention(vision)
    attention = 1.0 if passes["vision"] == 1 else 3.0
    head, last = model.get_output_embeddings().weight, last_mlp(model)
    matrices = [] if last is None else [weight for weight in last.parameters() if weight.ndim >= 2]
    at_labels = sum(passes["language"] * weight.numel() + _own(weight) for weight in matrices)
    return CostModel(
        token=products["language"] - at_labels,
        token_pair=3.0 * _depth(text) * _width(text),
        image_token=patches * (products["vision"] + windows * attention) + products["projector"],
        image_token_pair=whole * patches**2 * attention,
        supervised=2.0 * head.numel() + _own(head) + at_labels,
    )


def _products(model: Any, components: Components, tune: Tune) -> dict[str, float]:
    """Of each part's linear layers and convolutions, for one row: what is looked up in a table is not computed."""
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    products, passes = dict.fromkeys(("vision", "projector", "language"), 0.0), _passes(tune)
    for name, parameter in model.named_parameters():
        own, module = base_name(name), name.rpartition(".")[0]
        in_place_of = ".original_module." in name  # what learns stands for it and is counted
        is_computed = parameter.ndim >= 2 and module not in tables and own.rpartition(".")[0] != components.head_name
        if is_computed and not in_place_of:
            part = components.part_of(own)
            products[part] += passes[part] * parameter.numel() + _own(parameter)
    return products


def _own(weight: nn.Parameter) -> float:
    """Multiply-additions of the weight's own gradient."""
    return float(weight.numel() * weight.requires_grad)


def _passes(tune: Tune) -> dict[str, float]:
    """How often each part's weights are multiplied: forward, and backward for their inputs where gradients pass."""
    passes = {part: 1.0 if isinstance(mode, Frozen) else 2.0 for part, mode in tune.parts.items()}
    passes["language"] = 2.0
    passes["projector"] = max(passes["projector"], passes["vision"])
    return passes


def _picture_attention(vision: Any) -> tuple[float, float]:
    """Multiply-additions forward per pair of patches, and per patch where layers attend within windows of patches."""
    if not hasattr(vision, "hidden_size") or not _depth(vision):  # a tower of another library: its products count alone
        return 0.0, 0.0
    depth, width = _depth(vision), _width(vision)
    blocks = getattr(vision, "fullatt_block_indexes", None)
    full = depth if blocks is None else len(blocks)
    in_window = 0 if blocks is None else (vision.window_size // vision.patch_size) ** 2
    return 2.0 * full * width, 2.0 * (depth - full) * width * in_window


def _depth(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 0))


def _width(config: Any) -> int:
    head = getattr(config, "head_dim", None)
    return int(head * config.num_attention_heads if head else config.hidden_size)
