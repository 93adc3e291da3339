"""What `mmtrain generate` is asked to run: the directory of a run, of an adapter or of a model."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.load import config_of_run
from mmtrain.config.schema import Config, Labels, Model
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor, processor_of
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.saved_processor import saved_settings
from mmtrain.errors import UserError
from mmtrain.generate.replies import ANY_LENGTH, Generator
from mmtrain.model.adapter import CONFIG, base_of, find_adapter, find_model, load_adapter, read_adapter
from mmtrain.model.load import length_limit, load_model
from mmtrain.model.packing_trial import try_rows
from mmtrain.progress import Progress
from mmtrain.runtime.device import loading_faults
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import visible


@dataclass(frozen=True, slots=True)
class Target:
    """What is loaded, and how the data of its training was encoded."""

    model: str
    """A model directory or the id of a model in the local hub cache."""
    adapter: Path | None = None
    labels: Labels = field(default_factory=Labels)
    dtype: str = "bfloat16"
    quantization: str | None = None
    """How the base model of an adapter is quantized, as in the run that trained the adapter."""
    processor_of: Model | None = None
    """The section of a config whose processor is used; None: the one with which the adapter or the model was
    trained."""

    @property
    def processor_settings(self) -> ProcessorSettings:
        """Those with which the adapter was trained, if they are saved with it. Raises UserError."""
        if self.adapter is None:
            return ProcessorSettings()
        return saved_settings(self.adapter, self.model)

    @property
    def name(self) -> str:
        return self.model if self.adapter is None else f"{self.model} with the adapter {self.adapter}"


def find_target(path: str, base: str | None = None, dtype: str | None = None) -> Target:
    """What is at `path`; `base`: the base model of an adapter, without it the one that the adapter names.

    The labels, the type of the weights and their quantization are those of the run's config, or else a config's
    defaults.
    Raises UserError where there is nothing to run, or where a run was not trained to reply.
    """
    folder = Path(path)
    config = _config_of_run(folder)
    if config is not None and config.objective.kind != "chat":
        raise UserError(
            f"{visible(path)}: the run has objective.kind: {config.objective.kind}, its model gives embeddings and no "
            "replies: use `mmtrain eval retrieval`"
        )
    labels = Labels() if config is None else config.labels
    dtype = dtype or ("bfloat16" if config is None else config.model.dtype)
    adapter = find_adapter(folder)
    if adapter is not None:
        quantization = None if config is None else config.model.quantization
        return Target(base_of(adapter, base), adapter, labels, dtype, quantization)
    if base is not None:
        raise UserError(f"--base: {visible(path)} has no {CONFIG}: --base is for the directory of an adapter")
    model = find_model(folder)
    if model is not None:
        return Target(str(model), None, labels, dtype)
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{visible(path)}: the run has not saved its model yet: finish it with `mmtrain train`")
    return Target(path, None, labels, dtype)


def _config_of_run(folder: Path) -> Config | None:
    """The config of the run in `folder`, or of the one that saved its adapter or model there; None where there is no
    run."""
    run = folder.parent if folder.name in ("adapter", "model", "best") else folder
    file = run / "config.yaml"
    return config_of_run(file) if (run / "checkpoints").is_dir() and file.is_file() else None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A target that is ready to reply."""

    target: Target
    model: Any
    encoder: Encoder
    generator: Generator
    runtime: Runtime


def load_target(target: Target, runtime: Runtime) -> Loaded:
    """Raises UserError where something is missing, broken or does not fit together."""
    adapter = None if target.adapter is None else read_adapter(target.adapter)
    if target.processor_of is not None:
        processor = processor_of(target.processor_of)
    else:
        processor = load_processor(target.model, target.processor_settings)
    encoder = Encoder(processor, target.labels.train_on, target.labels.end_of_turn)
    with loading_faults():
        model = load_model(
            target.model, target.dtype, processor, runtime.device, runtime.activity.tick, target.quantization
        )
    if adapter is not None:
        model = load_adapter(model, adapter)
        model.to(runtime.device)
    limit = length_limit(target.model, ANY_LENGTH).num_tokens

    @functools.cache
    def alone() -> bool:
        found = try_rows(model, processor, getattr(torch, target.dtype), packing=False)
        if found.alone:
            Progress(quiet=not runtime.is_main).say(f"one question at a time: {found.fault}")
        return found.alone

    generator = Generator(model, encoder, runtime.autocast, limit, alone=alone)
    return Loaded(target, model, encoder, generator, runtime)
