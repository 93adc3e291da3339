"""The base model, and adapters put on it one after the other, to be scored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from peft import PeftModel

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.adapter import Adapter, load_adapter
from mmtrain.model.components import is_as_loaded
from mmtrain.model.family import probe_family
from mmtrain.model.root_module import RootModule
from mmtrain.model.vision import prepare_vision
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.image_cache import input_maker, make_store
from mmtrain.scoring.load import load_base
from mmtrain.scoring.loaded_model import LoadedModel, image_loader
from mmtrain.scoring.packing import choose_rows


class AdaptedModels:
    """The base model of a config, frozen and on its device, and `adapters`, by name, put on it one after the other.

    `cache_images`: keep the outputs of its vision and projector, where the config leaves room for them.
    """

    def __init__(
        self,
        config: Config,
        processor: ChatProcessor,
        runtime: Runtime,
        progress: Progress,
        adapters: Mapping[str, Adapter],
        cache_images: bool = True,
    ) -> None:
        self._processor, self._runtime, self._progress, self._adapters = processor, runtime, progress, adapters
        self._config = config
        self._model = load_base(config, processor, runtime).requires_grad_(False)
        self._family = probe_family(self._model, processor, progress.say, config.tune.components)
        with runtime.autocast():
            self._vision = prepare_vision(self._model, processor, runtime.device, progress.say)
        self._rows = choose_rows(self._model, processor, config, runtime, progress.say)
        self._load_images = image_loader(processor, runtime, self._vision, progress.say)
        self._store = make_store(config, runtime, progress) if cache_images else None
        self._names: dict[str, str] = {}
        """The name in the model of each adapter that is in it."""

    @contextmanager
    def adapted(self, name: str | None) -> Iterator[LoadedModel]:
        """The base model with the adapter `name`; None: the base model alone.

        Raises UserError where the adapter does not fit the model.
        """
        self.add(name)
        with self.active(name):
            yield self.loaded()

    def add(self, name: str | None) -> None:
        """Load the adapter `name`, unless it is loaded. Raises UserError where it does not fit the model."""
        if name is not None and name not in self._names:
            self._names[name] = f"adapter_{len(self._names)}"
            self._model = load_adapter(self._model, self._adapters[name], self._names[name])

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the model computes with the adapter `name`, which was added, or with none."""
        if name is not None:
            self._model.set_adapter(self._names[name], inference_mode=True)
        is_base = name is None and isinstance(self._model, PeftModel)
        with self._model.disable_adapter() if is_base else nullcontext():
            yield

    def loaded(self) -> LoadedModel:
        """The model, which computes with the adapter that is active then; to be made after all adapters are added."""
        model, runtime = self._model, self._runtime
        makes_features = ["vision", "projector", *(["language"] if self._config.tune.components.language else [])]
        same = is_as_loaded(model, self._family.components, makes_features)  # with all adapters so far
        store = self._store if same else None
        make_inputs = input_maker(
            model, self._processor, self._config, runtime, store, self._vision, self._progress.say
        )
        if same and make_inputs.features is None:
            self._store = None  # no adapter changes that
        return LoadedModel(
            model=model,
            processor=self._processor,
            root=RootModule(model),
            make_inputs=make_inputs,
            head_kind=self._family.head_kind,
            packing=self._rows.packing,
            alone=self._rows.alone,
            runtime=runtime,
            load_images=self._load_images,
        )
