"""The models that are scored: the base model of a config, with adapters, and complete models that runs have saved."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mmtrain.config import Config
from mmtrain.config.schema import Model
from mmtrain.dataset.hashes import digest
from mmtrain.encoding.directory import copy_processor, model_directory, processor_files
from mmtrain.encoding.load import read_template
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.saved_processor import differences
from mmtrain.errors import UserError
from mmtrain.model.adapter import Adapter, complete_model, read_adapter
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import visible
from mmtrain.scoring.adapters import AdaptedModels
from mmtrain.scoring.distributions import ModelPair
from mmtrain.scoring.loaded_model import LoadedModel

BASE = "base"
"""Names the base model among the others."""


@dataclass(frozen=True, slots=True)
class FoundModels:
    """The models of other runs, by the paths that name them; nothing of them is loaded into a model yet."""

    adapters: dict[str, Adapter]
    complete: dict[str, Path]
    """Directories of complete models."""


def find_models(paths: Sequence[str], base: Model) -> FoundModels:
    """`paths`: directories of adapters, or of runs that saved an adapter or a complete model.

    Raises UserError where one of them cannot be used with the model of the section `base`.
    """
    complete = {path: folder for path in paths if (folder := complete_model(Path(path))) is not None}
    for folder in complete.values():
        _check_same_processor(base, folder)
    return FoundModels({path: read_adapter(path) for path in paths if path not in complete}, complete)


class ComparedModels:
    """The base model of a config and the models of other runs, ready to be scored one after the other."""

    def __init__(
        self, config: Config, found: FoundModels, processor: ChatProcessor, runtime: Runtime, progress: Progress
    ) -> None:
        """Raises UserError where a model cannot be loaded."""
        base = AdaptedModels(config, processor, runtime, progress, found.adapters)
        self._named: dict[str, tuple[AdaptedModels, str | None]] = {BASE: (base, None)}
        self._named |= {path: (base, path) for path in found.adapters}
        for path, folder in found.complete.items():
            if config.model.quantization is not None:
                progress.say(
                    f"{visible(path)} was saved whole: it is loaded without model.quantization, the base model with it"
                )
            settings = config.model.model_copy(update={"path": str(folder), "quantization": None})
            own = config.model_copy(update={"model": settings})
            self._named[path] = (AdaptedModels(own, processor, runtime, progress, {}), None)

    def model(self, name: str) -> AbstractContextManager[LoadedModel]:
        """One of the models, ready to be scored."""
        models, adapter = self._named[name]
        return models.adapted(adapter)

    def pair(self, first: str, second: str) -> ModelPair:
        """Two of the models, to be compared batch by batch."""
        (models, adapter), (others, other) = self._named[first], self._named[second]
        models.add(adapter)
        others.add(other)
        return ModelPair(models.loaded(), others.loaded(), lambda: models.active(adapter), lambda: others.active(other))


def _check_same_processor(base: Model, folder: Path) -> None:
    """Raises UserError if the model in `folder` makes other ids than the model of `base`: they cannot be compared."""
    template = None if base.chat_template is None else read_template(Path(base.chat_template))
    with TemporaryDirectory() as made:  # as a run with this config saves it
        copy_processor(model_directory(base.path), Path(made), template, base.image_processor)
        same = digest(processor_files(Path(made))) == digest(processor_files(folder))
    if not same:
        found = "; ".join(differences(folder, base))
        what = f" ({found})" if found else ""
        raise UserError(
            f"{visible(str(folder))}: it has other tokenizer or processor files than {visible(base.path)}{what}: "
            "set the same in the config, or evaluate it as model.path"
        )
