"""The embedder of a config."""

import functools

from mmtrain.config import Config
from mmtrain.contrastive.chat_embedder import ChatEmbedder
from mmtrain.contrastive.embedder import Embedder, check_dims
from mmtrain.contrastive.scale import Multiplier, constant
from mmtrain.contrastive.towers import Towers
from mmtrain.encoding.directory import is_dual_encoder
from mmtrain.encoding.load import processor_of
from mmtrain.encoding.tower_processor import load_tower_processor
from mmtrain.errors import UserError
from mmtrain.model.family import probe_family
from mmtrain.model.load import (
    check_vocabulary,
    length_limit,
    load_config,
    load_without_weights,
)
from mmtrain.progress import QUIET, Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.load import load_base
from mmtrain.scoring.packing import RowChoice, choose_rows


def load_embedder(config: Config, runtime: Runtime, progress: Progress = QUIET, weights: str | None = None) -> Embedder:
    """The model of the config on its device, not yet frozen, with the scale and bias of `objective`. `weights`: a model
    directory whose weights are loaded in the place of the config's; the processor stays that of the config.

    Raises UserError where it lacks what the config names.
    """
    is_dual = is_dual_encoder(load_config(config.model.path))
    if is_dual:
        embedder: Embedder = load_towers(config, runtime, weights)
    else:
        embedder = load_chat_embedder(config, runtime, progress, weights)
    settings = config.objective
    check_dims(settings.dims, embedder.width)
    embedder.scale = _chosen("scale", embedder.scale, settings.scale)
    if settings.loss == "sigmoid":
        embedder.bias = _chosen("bias", embedder.bias, "trained" if settings.bias is None else settings.bias)
    return embedder


def load_towers(config: Config, runtime: Runtime, weights: str | None = None) -> Towers:
    """A dual encoder; `weights` as in `load_embedder`. Raises UserError where it does not pass its trial."""
    path, pooling = config.model.path, config.objective.pooling
    if pooling != "family":
        raise UserError(f"objective.pooling: {pooling}: a dual encoder pools in its own way: set it to family")
    if config.model.chat_template is not None:
        raise UserError("model.chat_template: a dual encoder has no chats: remove the key")
    if config.run.packing is True:
        raise UserError("run.packing: true: a dual encoder gets a row for each item: set it to auto or false")
    processor = load_tower_processor(path, config.model.image_processor)
    path = weights or path
    model = load_base(with_path(config, path), None, runtime)
    try:
        towers = Towers(model, processor, runtime.autocast)
        check_vocabulary(path, processor.tokenizer, towers.word_embeddings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return towers


def load_chat_embedder(
    config: Config, runtime: Runtime, progress: Progress, weights: str | None = None
) -> ChatEmbedder:
    """A model of chats; `weights` as in `load_embedder`. Raises UserError where it cannot be used."""
    path, pooling = config.model.path, config.objective.pooling
    processor = processor_of(config.model)
    if pooling == "family":
        raise UserError(f"objective.pooling: family is for dual encoders, and {path} is none: set it to last or mean")
    model = load_base(with_path(config, weights or path), processor, runtime)
    family = probe_family(model, processor, progress.say)
    rows = choose_rows(model, processor, config, runtime, progress.say)
    limit = functools.partial(length_limit, path)
    return ChatEmbedder(model, processor, family, rows, pooling, limit, runtime.autocast, progress.say)


def with_path(config: Config, path: str) -> Config:
    """The config with this `model.path`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def reloaded(embedder: Embedder, path: str, config: Config, runtime: Runtime) -> Embedder:
    """An embedder of the same kind with the model saved at `path`."""
    saved = with_path(config, path)
    return load_towers(saved, runtime) if isinstance(embedder, Towers) else load_chat_embedder(saved, runtime, QUIET)


def without_weights(embedder: Embedder, config: Config, runtime: Runtime) -> Embedder:
    """The embedder of `config`, which was loaded before, with a new model. For `WithoutValues`: no trial is repeated
    whose result depends on values."""
    model = load_without_weights(config.model)
    if isinstance(embedder, Towers):
        return embedder.with_model(model, runtime.autocast)
    processor, rows = embedder.processor, RowChoice(embedder.packing, embedder.alone)
    family, pooling = probe_family(model, processor, QUIET.say), config.objective.pooling
    assert pooling != "family"
    made = ChatEmbedder(model, processor, family, rows, pooling, embedder.limit, runtime.autocast, QUIET.say)
    made.scale, made.bias = embedder.scale, embedder.bias
    return made


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


def set_trained(config: Config, embedder: Embedder) -> None:
    """Have the scale and the bias trained, in float32, where the config says so. After `apply_tune`, which freezes."""
    settings = config.objective
    chosen = [(embedder.scale, settings.scale)]
    if settings.loss == "sigmoid":
        chosen.append((embedder.bias, "trained" if settings.bias is None else settings.bias))
    for number, setting in chosen:
        if number.parameter is not None and setting == "trained":
            number.parameter.data = number.parameter.data.float()
            number.parameter.requires_grad_(True)
    embedder.scale.limit(settings.temperature_max)
