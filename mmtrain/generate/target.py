"""What `mmtrain generate` is asked to run: found, and made ready to reply."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor, processor_of
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.generate.replies import Generator
from mmtrain.model.load import length_limit
from mmtrain.model.named_model import NamedModel, find_named
from mmtrain.model.packing_trial import try_rows
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import visible
from mmtrain.scoring.load import load_named


def find_target(path: str, base: str | None = None, dtype: str | None = None) -> NamedModel:
    """`find_named`. Raises UserError also where a run was not trained to reply."""
    found = find_named(path, base, dtype)
    kind = "chat" if found.config is None else found.config.objective.kind
    if kind != "chat":
        raise UserError(
            f"{visible(path)}: the run has objective.kind: {kind}, its model gives embeddings and no replies: "
            "use `mmtrain eval retrieval`"
        )
    return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to reply."""

    target: NamedModel
    model: Any
    encoder: Encoder
    generator: Generator
    runtime: Runtime


def load_evaluated(config: Config, path: Path | None, runtime: Runtime) -> Loaded:
    """The base model of a config, the adapter at `path` on it or the model that the run there saved, always with the
    processor of the config. Raises UserError as `load_target`."""
    return load_target(NamedModel.of(config, path), runtime, processor_of(config.model))


def load_target(target: NamedModel, runtime: Runtime, processor: ChatProcessor | None = None) -> Loaded:
    """`processor`: in place of that with which the adapter or the model was trained.

    Raises UserError where something is missing, broken or does not fit together.
    """
    processor = processor or load_processor(target.path, target.processor_settings)
    encoder = Encoder(processor, target.labels.train_on, target.labels.end_of_turn)
    model = load_named(target, processor, runtime.device, runtime.activity.tick)
    limit = length_limit(target.path).num_tokens

    @functools.cache
    def alone() -> bool:
        found = try_rows(model, processor, getattr(torch, target.dtype), packing=False)
        if found.alone:
            Progress(quiet=not runtime.is_main).say(f"one question at a time: {found.fault}")
        return found.alone

    generator = Generator(model, encoder, runtime.autocast, limit, alone=alone)
    return Loaded(target, model, encoder, generator, runtime)
