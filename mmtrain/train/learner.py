"""The model that is trained, on its device, with its optimizer."""

from collections.abc import Callable
from typing import Any

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.cost import cost_model
from mmtrain.model.kernels.install import install
from mmtrain.model.load import compile_layers
from mmtrain.model.root_module import RootModule
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.shard import shard
from mmtrain.scoring.image_cache import caches_features, input_maker, make_store
from mmtrain.scoring.loaded_model import image_loader
from mmtrain.scoring.packing import choose_rows
from mmtrain.train.optimizer import make_optimizer
from mmtrain.train.step import Learner
from mmtrain.train.trainable import make_trainable


def make_learner(
    config: Config,
    processor: ChatProcessor,
    runtime: Runtime,
    progress: Progress,
    load: Callable[[], Any] | None = None,
) -> Learner:
    """Load the model, add its trainable parameters, and decide how it is computed; `progress` says what was decided.
    `load`: as in `make_trainable`.

    Packing and the image cache are tried before the weights are sharded or the layers compiled.
    """
    if config.run.microbatches != "auto":
        runtime.make_deterministic()
    made = make_trainable(config, processor, runtime, progress, load)
    model, settings = made.model, config.run
    root = RootModule(model)
    sharded = settings.is_sharded(runtime.num_processes)
    if settings.kernels == "auto":
        progress.say(install(model, runtime.device, progress.tick).line)
    costs = cost_model(made.base, made.family, config.tune)
    rows = choose_rows(model, processor, config, runtime, progress.say)
    if sharded:
        rows.check_sharded(processor)
    store = make_store(config, runtime, progress) if caches_features(config, runtime.num_processes) else None
    make_inputs = input_maker(model, processor, config, runtime, store, made.vision, progress.say)
    if settings.compile:
        compile_layers(made.base)
    if sharded:
        shard(root, runtime.device)
        model.to(runtime.device)
    return Learner(
        model=model,
        processor=processor,
        root=root,
        make_inputs=make_inputs,
        head_kind=made.family.head_kind,
        packing=rows.packing,
        alone=rows.alone,
        runtime=runtime,
        load_images=image_loader(processor, runtime, made.vision, progress.say),
        optimizer=make_optimizer(model, made.family.components, config),
        dropout=made.dropout,
        lost_gradients=made.lost_gradients,
        costs=costs,
        component_reports=made.component_reports,
        exact=settings.microbatches != "auto" and not sharded,
        sharded=sharded,
    )
