"""What transformers alone makes of a family's conversations: the reference for mmtrain's ids and tensors."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import processor_class_from_name

from mmtrain.encoding.encode import Encoded
from mmtrain.records.chat import Conversation, Image, Message, Text
from support.families_grid import GRID
from support.families_more import MORE
from support.families_other import OTHER
from support.families_recent import RECENT
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import Family, make_family

FAMILIES: dict[str, Family] = {**GRID, **TILE, **MORE, **OTHER, **RECENT, **TEXT_ONLY}

IMAGES = {"square.png": (64, 64), "wide.png": (120, 50)}
_SQUARE, _WIDE = (Image(name) for name in IMAGES)
CASES: dict[str, list[tuple[Any, list[Any]]]] = {
    "text": [("user", ["what is it?"]), ("assistant", ["a circle"])],
    "one_image": [("user", [_WIDE, "what is it?"]), ("assistant", ["a square"])],
    "two_images": [("user", [_SQUARE, _WIDE, "which is red?"]), ("assistant", ["the second is"])],
    "between": [("user", ["is ", _SQUARE, " like this?"]), ("assistant", ["blue"])],
    "system": [("system", ["be brief"]), ("user", ["what?"]), ("assistant", ["red"])],
    "system_and_image": [("system", ["be brief"]), ("user", [_SQUARE, "what?"]), ("assistant", ["red"])],
    "two_answers": [("user", ["1?"]), ("assistant", ["one and"]), ("user", ["2?"]), ("assistant", ["two"])],
}
FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}"
"""A run does not depend on the day it is started."""


def is_usable(name: str) -> bool:
    """Whether what the family's processor needs is installed."""
    return all(importlib.util.find_spec(package) for package in FAMILIES[name].needs.split())


def conversation_of(case: str) -> Conversation:
    return Conversation(
        tuple(
            Message(role, tuple(part if isinstance(part, Image) else Text(part) for part in parts))
            for role, parts in CASES[case]
        )
    )


def conversations(name: str) -> dict[str, Conversation]:
    """What a family is tried with, by the name of the case."""
    made = {case: conversation_of(case) for case in CASES}
    return {case: one for case, one in made.items() if FAMILIES[name].images or not one.images}


def save_images(folder: Path) -> Path:
    for i, (name, size) in enumerate(IMAGES.items()):
        PIL.Image.new("RGB", size, (200, 90 * i, 40)).save(folder / name)
    return folder


@cache
def home() -> Path:
    """The folder of the tiny models of this process."""
    return Path(mkdtemp(prefix="families-"))


@cache
def directory(name: str) -> Path:
    return make_family(FAMILIES[name], home() / name)


def given_template(name: str) -> str | None:
    """The file to give as `model.chat_template`."""
    return str(directory(name) / "given.jinja") if FAMILIES[name].given_template else None


@cache
def reference(name: str) -> Any:
    """The family's own processor, or the tokenizer of a text model; its parts for video and sound are left out."""
    path = directory(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if FAMILIES[name].given_template:
        tokenizer.chat_template = FAMILIES[name].template
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = FIXED_DATE + tokenizer.chat_template
    if not FAMILIES[name].images:
        return tokenizer
    settings = json.loads((path / "processor_config.json").read_text())
    family = processor_class_from_name(settings.pop("processor_class"))
    parts = {"tokenizer": tokenizer, "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil")}
    return without_video(family, parts, chat_template=tokenizer.chat_template, **settings)


def without_video(family: Any, parts: dict[str, Any], **settings: Any) -> Any:
    """A processor of the class `family` without its parts for video and sound."""
    absent = SimpleNamespace(num_frames=None, fps=None, slice_mode=None, downsample_mode=None)

    class WithoutVideo(family):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is absent else super().check_argument_for_proper_class(name, argument)

    made = {part: parts.get(part, absent) for part in family.get_attributes()}
    return WithoutVideo(**made, **settings)


def tokenizer_of(name: str) -> Any:
    return reference(name).tokenizer if FAMILIES[name].images else reference(name)


def as_messages(name: str, conversation: Conversation, root: Path) -> list[dict[str, Any]]:
    """A conversation as transformers takes it."""
    family, messages = FAMILIES[name], []
    for message in conversation.messages:
        content: Any = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": PIL.Image.open(root / part.name).convert("RGB")}
            for part in message.parts
        ]
        if family.strings == "all" or message.role in family.strings.split():
            content = "".join(part["text"] for part in content)
        messages.append({"role": message.role, "content": content})
    return messages


def own_inputs(name: str, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What the family's own `apply_chat_template` makes of the messages."""
    made = dict(reference(name).apply_chat_template(messages, tokenize=True, return_dict=True, **options))
    return {key: value for key, value in made.items() if key != "labels"}


def own_ids(name: str, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
    """The family's own ids; with `prompt` those that a reply to `messages` follows."""
    ids = own_inputs(name, messages, add_generation_prompt=prompt, return_tensors="pt")["input_ids"]
    return [int(id_) for id_ in ids[0]]


def prompted_inputs(
    name: str, messages: list[dict[str, Any]], whole: list[int], encoded: Encoded
) -> dict[str, Any] | None:
    """What a reply follows in inference, then the ids that end the family's own `whole`: the reply and its end. None
    where that is not what was encoded."""
    inputs = own_inputs(name, messages[:-1], add_generation_prompt=True, return_tensors="pt")
    start = int(encoded.supervised.argmax())
    reply = encoded.ids[start:].tolist()
    if inputs["input_ids"][0].tolist() != encoded.ids[:start].tolist() or whole[-len(reply) :] != reply:
        return None
    added = {"input_ids": reply, "attention_mask": [1] * len(reply)}
    if FAMILIES[name].marks_replies:
        added["token_type_ids"] = [1] * len(reply)
    text_keys = [key for key, value in inputs.items() if value.shape == inputs["input_ids"].shape]
    more = {key: torch.tensor([added.get(key, [0] * len(reply))]) for key in text_keys}
    return {key: torch.cat([value, more[key]], dim=1) if key in more else value for key, value in inputs.items()}


def as_rows(tried: list[Conversation]) -> list[dict[str, Any]]:
    """The conversations as records of a data file."""
    return [
        {
            "messages": [
                {
                    "role": message.role,
                    "content": [
                        {"type": "image", "image": part.name}
                        if isinstance(part, Image)
                        else {"type": "text", "text": part.text}
                        for part in message.parts
                    ],
                }
                for message in conversation.messages
            ]
        }
        for conversation in tried
    ]
