"""What a run's result depends on besides its config: the bytes of its data, images and base model; dropout masks."""

import hashlib
import json
from collections.abc import Callable

from mmtrain.config import Config
from mmtrain.config.tune_section import Lora
from mmtrain.dataset.hashes import digest, model_fingerprints
from mmtrain.dataset.selection import SelectedSources
from mmtrain.dataset.stream import Stream
from mmtrain.model.dropout import MASKS
from mmtrain.model.earlier_run import trained_files
from mmtrain.model.quantization import quantizer
from mmtrain.train.objective import RunData


def fingerprints(config: Config, data: RunData, tick: Callable[[], None]) -> dict[str, str]:
    """A SHA-256 for each thing, by the name under which a change of it is refused; for what quantizes the model and for
    dropout masks, a name and version. `tick` is called for every file."""
    found = model_fingerprints(config.model.path, tick)
    if config.model.adapter is not None:
        found["model.adapter.weights"] = digest(trained_files(config.model.adapter), tick)
    if config.model.quantization is not None:
        found["model.quantizer"] = quantizer(config.model.quantization)
    if data.template is not None:
        found["model.template"] = hashlib.sha256(data.template.encode()).hexdigest()
    found |= _of_training_data(config, data, tick) if data.stream is None else _of_stream(config, data.stream)
    if config.train.early_stopping is not None:
        for number, (records, images) in enumerate(data.eval_files):
            found[f"data.eval.{number}.records"] = digest(records, tick)
            found[f"data.eval.{number}.images"] = digest(images, tick)
    for component, tuned in config.tune.modes.items():
        if isinstance(tuned, Lora) and tuned.dropout > 0:
            found[f"tune.{component}.dropout.masks"] = MASKS
    return found


def _of_training_data(config: Config, data: RunData, tick: Callable[[], None]) -> dict[str, str]:
    found = {
        f"data.train.{number}.records": digest(data.train.records.files_of(number), tick)
        for number in range(len(config.data.train))
    }
    if not SelectedSources.for_training(config.data).is_everything:
        found["data.train.used"] = hashlib.sha256(data.used.astype("<i8").tobytes()).hexdigest()
    return found | {"data.train.images": digest(sorted(data.image_files), tick)}


def _of_stream(config: Config, stream: Stream) -> dict[str, str]:
    """The names and sizes of the files: reading them would take as long as the run."""
    found = {}
    for number in range(len(config.data.train)):
        files = [[str(path), path.stat().st_size] for path in stream.order.files_of(number)]
        found[f"data.train.{number}.files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return found
