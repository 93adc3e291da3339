"""The embedder of a config."""

from mmtrain.config import Config
from mmtrain.contrastive.embedder import check_dims
from mmtrain.contrastive.scale import Multiplier, constant
from mmtrain.contrastive.towers import Towers
from mmtrain.encoding.tower_processor import load_tower_processor
from mmtrain.errors import UserError
from mmtrain.model.load import check_vocabulary, is_dual_encoder, load_config, load_weights
from mmtrain.runtime.device import loading_faults
from mmtrain.runtime.processes import Runtime


def load_embedder(config: Config, runtime: Runtime) -> Towers:
    """The model of the config on its device, frozen, with the scale and bias of `objective`.

    Raises UserError where it is no dual encoder, or lacks what the config names.
    """
    path = config.model.path
    if not is_dual_encoder(load_config(path)):
        raise UserError(f"{path}: objective.kind: contrastive needs a dual encoder such as CLIP or SigLIP")
    processor = load_tower_processor(path)
    with loading_faults():
        model = load_weights(path, config.model.dtype, runtime.device, runtime.activity.tick)
    model.requires_grad_(False)
    try:
        towers = Towers(model, processor, runtime.autocast)
        check_vocabulary(path, processor.tokenizer, model.get_submodule(towers.text_tower).get_input_embeddings())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    settings = config.objective
    check_dims(settings.dims, towers.width)
    towers.scale = _chosen("scale", towers.scale, settings.scale)
    if settings.loss == "sigmoid":
        towers.bias = _chosen("bias", towers.bias, "trained" if settings.bias is None else settings.bias)
    return towers


def _chosen(name: str, own: Multiplier, setting: str | float) -> Multiplier:
    """The model's own number, which a number in the config replaces in the model, so that it is exported."""
    if isinstance(setting, str):
        if own.parameter is None:
            raise UserError(f"objective.{name}: {setting}: the model has no {name} of its own: give a number")
        return own
    if own.parameter is None:
        return constant(setting)
    own.set(setting)
    return own


def set_trained(config: Config, towers: Towers) -> None:
    """Have the scale and the bias trained, in float32, where the config says so. After `apply_tune`, which freezes."""
    settings = config.objective
    chosen = [(towers.scale, settings.scale)]
    chosen += (
        [(towers.bias, "trained" if settings.bias is None else settings.bias)] if settings.loss == "sigmoid" else []
    )
    for number, setting in chosen:
        if number.parameter is not None and setting == "trained":
            number.parameter.data = number.parameter.data.float()
            number.parameter.requires_grad_(True)
    towers.scale.limit(settings.temperature_max)
