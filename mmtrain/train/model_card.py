"""README.md of a saved adapter or model: what it is, how good it is, and how to load it; no path of this machine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain import __version__
from mmtrain.config import Config
from mmtrain.config.yaml_file import dump_yaml
from mmtrain.safe_text import visible
from mmtrain.train.metrics import METRICS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATHS: Any = {"model": {"path"}, "data": {"train", "eval"}, "run": {"output_dir"}}
"""Keys of a config that are left out: paths of this machine."""

_LOAD_ADAPTER = """\
import torch
from peft import PeftConfig, PeftModel
from transformers import {auto_class}

adapter = "."  # this directory, or the id of this repository
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
model = {auto_class}.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, adapter).eval()
"""
_LOAD_QUANTIZED = """\
import torch
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, {auto_class}

adapter = "."  # this directory, or the id of this repository
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
quantization = BitsAndBytesConfig({settings})
model = {auto_class}.from_pretrained(base, dtype=torch.{dtype}, quantization_config=quantization)
model = PeftModel.from_pretrained(model, adapter).eval()
"""
_QUANTIZED = "The language model was quantized to 4 bits (NF4) in training. Load it quantized too, as shown below."
_LOAD_MODEL = """\
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained(".", dtype=torch.{dtype}).eval()  # this directory, or the id of this repository
"""


def model_card(
    config: Config, auto_class: str, is_adapter: bool, num_samples: int, quantization: str | None = None
) -> str:
    """The text of the card. `auto_class`: the class of transformers that loads the base model; `num_samples`: what was
    trained on; `quantization`: the arguments that quantize the base model as it was in training. The other figures are
    read from the run's metrics."""
    base = hub_id(config.model.path)
    header = {
        **({} if base is None else {"base_model": base}),
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["mmtrain", "lora"] if is_adapter else ["mmtrain"],
    }
    load = _LOAD_MODEL if not is_adapter else _LOAD_ADAPTER if quantization is None else _LOAD_QUANTIZED
    code = load.format(auto_class=auto_class, dtype=config.model.dtype, settings=quantization)
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {'A LoRA adapter' if is_adapter else 'A model'} trained by mmtrain {__version__}",
        "",
        f"The base model is {base}." if base else "The base model was a directory that has no id on the hub.",
        *([] if quantization is None else [_QUANTIZED]),
        "The files of its tokenizer and its processor are in this directory too.",
        "",
        *_figures(Path(config.run.output_dir) / METRICS, num_samples, config.train.batch_size),
        "",
        "```python",
        code + "```",
        "",
        "## Config",
        "",
        "Without the paths of the model, the data and the run:",
        "",
        "```yaml",
        dump_yaml(config.model_dump(mode="json", exclude=_PATHS)).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def hub_id(path: str) -> str | None:
    """The id on the hub of the model at `path`, if known: `path` itself, or what its config.json says it was."""
    name: Any = path
    if Path(path).is_dir():
        name = json.loads((Path(path) / "config.json").read_bytes()).get("_name_or_path")
    is_id = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return name if is_id else None


def _figures(metrics: Path, num_samples: int, batch_size: int) -> Iterator[str]:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    yield f"- training samples: {num_samples:,}"
    steps = [row for row in rows if "eval" not in row]
    if not steps:  # the file was deleted before the run was resumed
        return
    last = steps[-1]
    yield f"- steps: {last['step']:,} of {batch_size:,} samples each"
    yield f"- loss of the last step: {last['loss']:.4f}"
    for row in rows:
        if "eval" in row and row["step"] == last["step"]:
            name, perplexity = visible(row["eval"]), row["perplexity"]
            yield f"- perplexity on {name}: {perplexity:.4f}, token accuracy {row['token_accuracy']:.1%}"
