"""README.md of a saved adapter or model: what it is, how good it is, and code that loads it; no local path."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmtrain import __version__
from mmtrain.config import Config
from mmtrain.config.yaml_file import dump_yaml
from mmtrain.safe_text import counted, visible
from mmtrain.scoring.statistics import perplexity_text
from mmtrain.train.metrics import METRICS, is_step, rows_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([\w.-]+)")
"""The name of a model's folder in the hub cache: `models--owner--name`."""
_PATHS: Any = {"model": {"path", "adapter", "chat_template"}, "data": {"train", "eval"}, "run": {"output_dir"}}
"""The keys of a config that are left out: paths of this machine."""
_IMAGE_CLASS = "AutoModelForImageTextToText"

LOAD_ADAPTER = """\
import torch
from peft import PeftConfig, PeftModel
from transformers import {auto_class}

folder = "."  # this directory, or the id of this repository
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = {auto_class}.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, folder).eval()
"""
_LOAD_QUANTIZED = """\
import torch
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, {auto_class}

folder = "."  # this directory, or the id of this repository
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
quantization = BitsAndBytesConfig({settings})
model = {auto_class}.from_pretrained(base, dtype=torch.{dtype}, quantization_config=quantization)
model = PeftModel.from_pretrained(model, folder).eval()
"""
_QUANTIZED = "The language model was quantized to 4 bits (NF4) in training. Load it quantized too, as shown above."
LOAD_MODEL = """\
import torch
from transformers import {auto_class}

folder = "."  # this directory, or the id of this repository
model = {auto_class}.from_pretrained(folder, dtype=torch.{dtype}).eval()
"""
_ASK_ABOUT_AN_IMAGE = """\
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(folder)
image = Image.new("RGB", (224, 224), "red")  # yours: Image.open("photo.jpg")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.dtype)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_ASK = """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "How are you?"}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def model_card(
    config: Config,
    auto_class: str,
    is_adapter: bool,
    num_samples: int,
    quantization: str | None = None,
    step: int | None = None,
) -> str:
    """The card of what a run saves. `auto_class`: the class of transformers that loads the base model; `num_samples`:
    the samples that were trained on; `quantization`: the arguments that quantize the base model as it was in training.
    The other figures are read from the run's metrics, up to `step` if that is not the last."""
    header = {
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["mmtrain", "lora"] if is_adapter else ["mmtrain"],
    }
    title = f"{'A LoRA adapter' if is_adapter else 'A model'} trained by mmtrain {__version__}"
    code = LOAD_MODEL if not is_adapter else LOAD_ADAPTER if quantization is None else _LOAD_QUANTIZED
    load = code.format(auto_class=auto_class, dtype=config.model.dtype, settings=quantization)
    quantized = [] if quantization is None else [_QUANTIZED, ""]
    figures = [f"- training samples: {num_samples:,}", *figure_lines(config, Path(config.run.output_dir), step)]
    return _card(config.model.path, header, title, auto_class, load, [*quantized, *figures, "", *config_lines(config)])


def merged_card(base: str, auto_class: str, dtype: str, config: Config | None, run: Path | None) -> str:
    """The card of a base model with an adapter merged into it. `config` and `run`: those that trained the adapter."""
    header = {"library_name": "transformers", "tags": ["mmtrain"]}
    title = f"A model with a LoRA adapter merged into it by mmtrain {__version__}"
    load = LOAD_MODEL.format(auto_class=auto_class, dtype=dtype)
    trained = [] if config is None or run is None else [*figure_lines(config, run), "", *config_lines(config)]
    return _card(base, header, title, auto_class, load, trained)


def _card(base: str, header: dict[str, Any], title: str, auto_class: str, load: str, trained: Iterable[str]) -> str:
    takes_images = auto_class == _IMAGE_CLASS
    optional = {"peft": "peft" in load, "bitsandbytes": "BitsAndBytes" in load, "pillow torchvision": takes_images}
    packages = ["torch", "transformers", *(name for name, needed in optional.items() if needed)]
    usage = [
        "The files of its tokenizer and its processor are in this directory too.",
        "",
        f"Load it, after `pip install {' '.join(packages)}`:",
        "",
        *as_code(load),
        "",
        "Ask it something:",
        "",
        *as_code(_ASK_ABOUT_AN_IMAGE if takes_images else _ASK),
    ]
    return card_text(base, header, title, usage, trained)


def as_code(python: str) -> list[str]:
    """The lines of a block of Python in a card."""
    return ["```python", python + "```"]


def card_text(base: str, header: dict[str, Any], title: str, usage: Iterable[str], trained: Iterable[str]) -> str:
    """A card. `base`: the path of the base model; `usage`: the lines on how to load what was saved; `trained`: those on
    its training."""
    name = hub_id(base)
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in ({} if name is None else {"base_model": name}).items()),
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {title}",
        "",
        f"The base model is {name}." if name else "The base model was a directory that has no id on the hub.",
        *usage,
        "",
        "## Training",
        "",
        *trained,
        "",
    ]
    return "\n".join(lines)


def config_lines(config: Config) -> Iterator[str]:
    """The config as a block of YAML."""
    yield "The config, without the paths of the model, the data and the run:"
    yield ""
    yield "```yaml"
    yield dump_yaml(config.model_dump(mode="json", exclude=_PATHS)).rstrip()
    yield "```"


def hub_id(path: str) -> str | None:
    """The id on the hub of the model at `path`, if known: `path` itself, the name of its folder in the hub cache, or
    what its config.json says."""
    name: Any = path
    if Path(path).is_dir():
        cached = [found for part in Path(path).resolve().parts if (found := _CACHED.fullmatch(part))]
        named = json.loads((Path(path) / "config.json").read_bytes()).get("_name_or_path")
        name = "/".join(cached[-1].groups()) if cached else named
    is_id = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return name if is_id else None


def figure_lines(config: Config, run: Path, step: int | None = None) -> Iterator[str]:
    """What the run in the directory `run` was trained on, and its figures up to `step`, by default the last."""
    names = ", ".join(visible(Path(source.path).name) for source in config.data.train)
    yield f"- trained on: {names}"
    if config.model.adapter is not None:
        yield "- started from the trained weights of an earlier run"
    rows = list(rows_of(run / METRICS))
    steps = [row for row in rows if is_step(row) and (step is None or row["step"] <= step)]
    if not steps:  # the file was deleted before the run was resumed
        return
    last = steps[-1]
    yield f"- steps: {last['step']:,} of {counted(config.train.batch_size, 'sample')} each"
    yield f"- loss of the last step: {last['loss']:.4f}"
    evaluated = [row for row in rows if row["step"] == last["step"] and not is_step(row)]
    for row in evaluated:
        yield _perplexity(row) if "eval" in row else _answers(row) if "answers" in row else _retrieval(row)


def _perplexity(row: dict[str, Any]) -> str:
    value, low, high = map(perplexity_text, (row["perplexity"], *row["interval"]["perplexity"]))
    return (
        f"- perplexity on {visible(row['eval'])}: {value} (95 % interval {low} to {high}), "
        f"token accuracy {row['token_accuracy']:.1%}, {counted(row['num_samples'], 'sample')}"
    )


def _answers(row: dict[str, Any]) -> str:
    metric = row["metric"]
    return (
        f"- {metric} of {counted(row['num_answers'], 'answer')} on {visible(row['answers'])}: "
        f"{row['metrics'][metric]:.1%}, best blind answer {row['blind'][metric]:.1%}"
    )


def _retrieval(row: dict[str, Any]) -> str:
    recalls = (f"{way} {own['recall@1']:.1%}" for way, own in row.items() if isinstance(own, dict))
    return f"- recall@1 on {visible(row['retrieval'])}: {', '.join(recalls)}"
