"""The weight files of a model directory: checked before transformers reads them, and written."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from mmtrain.errors import UserError, system_error
from mmtrain.safe_text import one_line, shown, visible
from mmtrain.text_files import json_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights by their names in safetensors files; integers are no weights."""
MAX_SHARD = "5GB"
"""The largest file of weights that is written, as the hub's own models have it."""
GENERATION = "generation_config.json"


def check_weight_files(directory: Path) -> None:
    """Raises UserError, naming the file, if weights are missing, truncated, outside `directory` or not safetensors.

    Only headers are read.
    """
    where = visible(str(directory))
    if (directory / "adapter_config.json").is_file():  # transformers would silently load it into the model
        raise UserError(f"{where}: adapter_config.json is there: give the directory of a base model, not of an adapter")
    for name in _names(directory):
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            file = visible(str(directory / name))
            raise UserError(f"{file}: not a complete safetensors file: {one_line(error)}; copy it again") from None


def stored_dtypes(directory: Path) -> set[str]:
    """The types of the floating-point weights in the files, such as float32. Only headers are read."""
    found = set()
    for name in _names(directory):
        with safe_open(directory / name, framework="pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.offset_keys()}
    return {_DTYPES.get(dtype, dtype) for dtype in found if not dtype.startswith(("I", "U", "BOOL"))}


def num_stored_bytes(directory: Path) -> int:
    """The size of the files with the weights."""
    return sum((directory / name).stat().st_size for name in _names(directory))


def num_stored_values(directory: Path) -> int:
    """The values of all tensors in the files. Only headers are read."""
    found = 0
    for name in _names(directory):
        with safe_open(directory / name, framework="pt") as file:
            found += sum(math.prod(file.get_slice(key).get_shape()) for key in file.offset_keys())
    return found


def check_finite_files(directory: Path) -> None:
    """Raises UserError naming a weight in the files that has a value which is NaN or infinite.

    For weights that are quantized as they are read: 4 bits cannot store such a value, so it would not show later.
    """
    for name in _names(directory):
        with safe_open(directory / name, framework="pt") as file:
            for key in file.offset_keys():
                weight = file.get_tensor(key)
                if weight.is_floating_point() and weight.numel() and not is_finite(weight):
                    raise UserError(
                        f"{visible(str(directory / name))}: {shown(key)} has values that are NaN or infinite: "
                        "expected finite numbers; copy or convert the model again"
                    )


def save_weights(model: Any, folder: Path) -> None:
    """Write config and weights in files of at most MAX_SHARD, without settings of generation. Raises OSError."""
    model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads
    try:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    except SafetensorError as error:
        raise system_error(error) or error from None
    (folder / GENERATION).unlink(missing_ok=True)


def differing_weights(model: Any, other: Any) -> list[str]:
    """The names of the weights that only one of two models has, or that are not the same bits."""
    own, others = model.state_dict(), other.state_dict()
    same = {name for name in own.keys() & others.keys() if torch.equal(own[name], others[name])}
    return sorted((own.keys() | others.keys()) - same)


def is_finite(weight: Tensor) -> bool:
    """Whether no value of `weight`, which has some, is NaN or infinite."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(weight))


def _names(directory: Path) -> list[str]:
    """The names of the files with the weights. Raises UserError where there are none."""
    if (directory / _SINGLE).is_file():
        return [_SINGLE]
    if (directory / _INDEX).is_file():
        return _indexed(directory / _INDEX)
    raise UserError(f"{visible(str(directory))}: {_missing(directory)}")


def _missing(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return f"no {_SINGLE}, only {shown(pickles[0])}, a pickle, which may run code: save the model as safetensors"
    others = [
        path.name for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", ".gguf") and path.is_file()
    ]
    found = f", found {shown(others[0])}" if others else ""
    return f"no weights: expected {_SINGLE} or {_INDEX} with the files that it lists{found}"


def _indexed(index: Path) -> list[str]:
    """The names of the files that an index lists. Raises UserError if it is broken or one of the files is missing."""
    where = visible(str(index))
    weights = json_object(index, where).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"{where}: expected weight_map, an object from names of weights to names of files")
    names = sorted(set(weights.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{where}: {shown(name)} is not the name of a safetensors file in the same directory")
        if not (index.parent / name).is_file():
            raise UserError(f"{where}: {shown(name)} is not there: copy the whole model directory")
    return names
