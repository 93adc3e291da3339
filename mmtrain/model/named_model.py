"""The model that a path names: that of a model directory, of an adapter or of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mmtrain.config.load import config_of_run
from mmtrain.config.schema import Config, Labels
from mmtrain.config.tune_section import ComponentModules
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.saved_processor import saved_settings
from mmtrain.errors import UserError
from mmtrain.model.adapter import CONFIG, find_adapter, find_model, named_base
from mmtrain.safe_text import visible


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A base model, perhaps with an adapter on it, or a model that a run trained whole."""

    path: str
    """A model directory or the id of a model in the local hub cache."""
    adapter: Path | None = None
    """The directory of the adapter."""
    dtype: str = "bfloat16"
    quantization: str | None = None
    """How the base model of an adapter is quantized, as in the run that trained the adapter."""
    config: Config | None = None
    """Of the run that trained it, or of its evaluation; None where there is none."""
    run: Path | None = None
    """The directory of the run that trained it, if it is known."""

    @classmethod
    def of(cls, config: Config, path: Path | None = None) -> Self:
        """The base model of a config, or with `path`, the option --adapter, the adapter there on it or the model that
        the run there saved whole. Raises UserError where there is neither."""
        settings = config.model
        adapter, model = (None, None) if path is None else (find_adapter(path), find_model(path))
        if path is not None and adapter is None and model is None:
            name = visible(str(path))
            raise UserError(f"--adapter {name}: expected the directory of an adapter or of a finished run")
        if adapter is None and model is not None:
            return cls(str(model), None, settings.dtype, None, config)
        return cls(settings.path, adapter, settings.dtype, settings.quantization, config)

    @property
    def labels(self) -> Labels:
        """How the data of its training was encoded."""
        return Labels() if self.config is None else self.config.labels

    @property
    def components(self) -> ComponentModules:
        """What the config says of its components."""
        return ComponentModules() if self.config is None else self.config.tune.components

    @property
    def processor_settings(self) -> ProcessorSettings:
        """Those with which the adapter was trained, if they are saved with it. Raises UserError."""
        return ProcessorSettings() if self.adapter is None else saved_settings(self.adapter, self.path)


def find_named(path: str, base: str | None, dtype: str | None) -> NamedModel:
    """What is at `path`. `base`: the base model of an adapter; None: the one that the adapter or its run names.
    `dtype`: of the weights; None: that of the run, or else a config's default.

    Raises UserError where there is no model.
    """
    folder = Path(path)
    run = _run_of(folder)
    config = None if run is None else config_of_run(run / "config.yaml")
    dtype = dtype or ("bfloat16" if config is None else config.model.dtype)
    adapter = find_adapter(folder)
    if adapter is not None:
        # the adapter has an absolute path; that in the config can be relative to another directory
        own = base or named_base(adapter) or (None if config is None else config.model.path)
        if own is None:
            raise UserError(f"{visible(str(adapter / CONFIG))}: it names no base model: give it as --base MODEL")
        return NamedModel(own, adapter, dtype, None if config is None else config.model.quantization, config, run)
    if base is not None:
        raise UserError(f"--base: {visible(path)} has no {CONFIG}: --base is for the directory of an adapter")
    model = find_model(folder)
    if model is None and (folder / "checkpoints").is_dir():
        raise UserError(f"{visible(path)}: the run has not saved its model yet: finish it with `mmtrain train`")
    return NamedModel(path if model is None else str(model), None, dtype, None, config, run)


def _run_of(folder: Path) -> Path | None:
    """The directory of the run that `folder` is, or of the one that saved its adapter or model there, if any."""
    run = folder.parent if folder.name in ("adapter", "model", "best") else folder
    is_run = any((run / name).is_dir() for name in ("checkpoints", "adapter"))
    return run if is_run and (run / "config.yaml").is_file() else None
