"""What follows from the shape of the config's model, whose weights are not read."""

from dataclasses import dataclass

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.cost import CostModel, cost_model
from mmtrain.model.family import probe_family
from mmtrain.model.load import model_structure
from mmtrain.model.tune import apply_tune
from mmtrain.progress import QUIET


@dataclass(frozen=True, slots=True)
class Structure:
    """The model with its trainable parameters."""

    costs: CostModel
    num_parameters: int
    """Of the base model."""
    num_trainable: int
    feature_bytes: int
    """Of the features of an image in the cache, for each of its placeholders."""


def structure_of(config: Config, processor: ChatProcessor) -> Structure:
    """Raises UserError where the model cannot be made, or the config names components that it does not have."""
    base = model_structure(config.model.path)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        family = probe_family(base, processor, QUIET.say, config.tune.components)
        model, _ = apply_tune(base, family.components, config.tune)
    width = base.get_input_embeddings().weight.shape[1]
    return Structure(
        costs=cost_model(base, family, config.tune),
        num_parameters=num_parameters,
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        feature_bytes=width * getattr(torch, config.model.dtype).itemsize,
    )
