"""Published tokenizers and chat templates of a few families, where they are on this machine."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.model.load import load_config
from support.builders import SHARED
from support.family_reference import (
    FAMILIES,
    FIXED_DATE,
    as_messages,
    conversations,
    directory,
    home,
    own_inputs,
    without_video,
)

WHOLE, TEMPLATE = "tokenizer and template", "template"
REAL = {
    "qwen2.5-vl-7b-instruct": "qwen2_5_vl",
    "granite-docling-258m_idefics3": "idefics3",
    "chat_templates_trl/qwen2_5_vl.jinja": "qwen2_5_vl",
    "chat_templates_trl/idefics3.jinja": "idefics3",
    "chat_templates_trl/llava_next.jinja": "llava_next",
    "chat_templates_trl/llama3.jinja": "llama",
    "minimind-v_tiny_tokenizer": "qwen3",
}
"""The family of published files. A template alone is tried with the tiny tokenizer."""


def real_files(published: str) -> Path:
    return SHARED / "models" / published


def real_column(name: str) -> str:
    """What of a family is published."""
    found = [published for published, family in REAL.items() if family == name]
    return (WHOLE if any(map(is_whole, found)) else TEMPLATE) if found else ""


def is_whole(published: str) -> bool:
    return not published.endswith(".jinja")


def other_ids(published: str, root: Path) -> list[str]:
    """The cases whose ids are not those that transformers makes with the published files."""
    name, file = REAL[published], real_files(published)
    path, template = (str(_with_config(published)), None) if is_whole(published) else (str(directory(name)), str(file))
    encoder = Encoder(load_processor(path, ProcessorSettings(template)))
    return [
        case
        for case, conversation in conversations(name).items()
        if encoder.encode(conversation, root).ids.tolist() != _own_ids(published, as_messages(name, conversation, root))
    ]


@cache
def _with_config(published: str) -> Path:
    """The published files, with the configuration of the tiny model where they have none."""
    files = real_files(published)
    if (files / "config.json").is_file():
        return files
    folder = home() / files.name
    shutil.copytree(files, folder, copy_function=shutil.copyfile)
    shutil.copyfile(directory(REAL[published]) / "config.json", folder / "config.json")
    return folder


def _own_ids(published: str, messages: list[dict[str, Any]]) -> list[int]:
    if is_whole(published) and not FAMILIES[REAL[published]].images:
        tokenizer = AutoTokenizer.from_pretrained(real_files(published))
        texts = [m | {"content": "".join(part["text"] for part in m["content"])} for m in messages]
        return list(tokenizer.apply_chat_template(texts, return_dict=False))
    if is_whole(published):
        made = _processor(real_files(published)).apply_chat_template(messages, tokenize=True, return_dict=True)
        return list(made["input_ids"][0])
    text = real_files(published).read_text(encoding="utf-8")
    made = own_inputs(REAL[published], messages, chat_template=FIXED_DATE + text, return_tensors="pt")
    return [int(id_) for id_ in made["input_ids"][0]]


@cache
def _processor(path: Path) -> Any:
    """The family's own, of Pillow's image processor and without its part for video."""
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(path),
        "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil"),
    }
    return without_video(PROCESSOR_MAPPING[type(load_config(str(path)))], parts, **_settings(path))


def _settings(path: Path) -> dict[str, Any]:
    """Those of the processor, and its chat template."""
    jinja, old, file = (path / name for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"))
    template = jinja.read_text() if jinja.is_file() else json.loads(old.read_text())["chat_template"]
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings.pop("processor_class", None)
    return settings | {"chat_template": template}
