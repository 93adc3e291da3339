"""The ids of many families are those of their own processor; the reference is transformers alone."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from family_models import FAMILIES, make_family
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.processing_auto import processor_class_from_name

from mmtrain.data.chat import Conversation, Image, Message, SampleError, Text
from mmtrain.data.encode import Encoded, Encoder
from mmtrain.data.processor import load_processor
from mmtrain.errors import UserError

IMAGES = {"square.png": (64, 64), "wide.png": (120, 50)}
_SQUARE, _WIDE = (Image(name) for name in IMAGES)
CASES: dict[str, list[tuple[str, list[Any]]]] = {
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


def cases(name: str) -> dict[str, Conversation]:
    """The conversations that a family is tried with."""
    made = {
        case: Conversation(
            tuple(
                Message(role, tuple(part if isinstance(part, Image) else Text(part) for part in parts))  # type: ignore[arg-type]
                for role, parts in turns
            )
        )
        for case, turns in CASES.items()
    }
    return {case: one for case, one in made.items() if FAMILIES[name].images or not one.images}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, (name, size) in enumerate(IMAGES.items()):
        PIL.Image.new("RGB", size, (200, 90 * i, 40)).save(folder / name)
    return folder


_homes: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    _homes.append(tmp_path_factory.mktemp("families"))


@cache
def directory(name: str) -> Path:
    return make_family(name, _homes[0] / name)


@cache
def encoder(name: str) -> Encoder:
    return Encoder(load_processor(str(directory(name))))


@cache
def reference(name: str) -> Any:
    """The family's own processor, or the tokenizer of a text model; parts for video and sound are left out."""
    path = directory(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = FIXED_DATE * ("strftime_now" in tokenizer.chat_template) + tokenizer.chat_template
    if not FAMILIES[name].images:
        return tokenizer
    settings = json.loads((path / "processor_config.json").read_text())
    family = processor_class_from_name(settings.pop("processor_class"))
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}

    class WithoutVideo(family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    made = {part: parts.get(part) for part in family.get_attributes()}
    return WithoutVideo(**made, chat_template=tokenizer.chat_template, **settings)


def as_messages(name: str, conversation: Conversation, root: Path) -> list[dict[str, Any]]:
    strings = FAMILIES[name].strings
    messages = []
    for message in conversation.messages:
        content: Any = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": PIL.Image.open(root / part.name)}
            for part in message.parts
        ]
        if strings == "all" or message.role in strings.split():
            content = message.text
        messages.append({"role": message.role, "content": content})
    return messages


def own_inputs(name: str, conversation: Conversation, root: Path, prompt: bool = False, **more: Any) -> dict[str, Any]:
    """What the family's own processor makes of a conversation, or with `prompt` of what comes before a reply."""
    messages = as_messages(name, conversation, root)
    made = reference(name).apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=prompt, **more
    )
    return dict(made)


def own_ids(name: str, conversation: Conversation, root: Path, prompt: bool = False) -> list[int]:
    ids = own_inputs(name, conversation, root, prompt)["input_ids"]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return list(ids[0] if isinstance(ids[0], list) else ids)


def without_added_ends(name: str, encoded: Encoded) -> list[int]:
    """The ids without the end tokens that the encoder puts where a family's template has none."""
    ids, supervised = encoded.ids.tolist(), [*encoded.supervised.tolist(), False]
    if FAMILIES[name].own_end:
        return ids
    eos = reference(name).tokenizer.eos_token_id if FAMILIES[name].images else reference(name).eos_token_id
    return [id_ for i, id_ in enumerate(ids) if not (id_ == eos and supervised[i] and not supervised[i + 1])]


REFUSED: dict[tuple[str, str], str] = {}
"""What cannot be trained on as it stands, and what the refusal says."""
DIFFERS: dict[tuple[str, str], str] = {}
"""Cases whose ids are not the family's own."""
BATCH_DIFFERS: dict[str, str] = {}


def _marked(wrong: dict[Any, str]) -> list[Any]:
    return [
        pytest.param(name, case, marks=pytest.mark.xfail(reason=wrong[name, case], strict=True))
        if (name, case) in wrong
        else (name, case)
        for name in USED
        for case in cases(name)
        if (name, case) not in REFUSED
    ]


USED = [name for name, family in FAMILIES.items() if family.needs is None]


@pytest.mark.parametrize(("name", "case"), _marked(DIFFERS))
def test_ids_are_the_familys_own(name: str, case: str, root: Path) -> None:
    conversation = cases(name)[case]
    encoded = encoder(name).encode(conversation, root)
    assert without_added_ends(name, encoded) == own_ids(name, conversation, root)
    start = encoded.supervised.tolist().index(True)
    asked = Conversation(conversation.messages[: 2 if case.startswith("system") else 1])
    assert encoded.ids[:start].tolist() == own_ids(name, asked, root, prompt=True)


def forward(name: str, conversation: Conversation, root: Path) -> torch.Tensor:
    """The loss of the tiny model on what the family's own processor gives."""
    inputs = own_inputs(name, conversation, root, return_tensors="pt")
    auto = AutoModelForImageTextToText if FAMILIES[name].images else AutoModelForCausalLM
    model = auto.from_pretrained(directory(name))
    labels = inputs["input_ids"].clone()
    labels[labels >= AutoConfig.from_pretrained(directory(name)).get_text_config().vocab_size] = -100
    with torch.no_grad():
        loss: torch.Tensor = model(**inputs, labels=labels).loss
    return loss


@pytest.mark.parametrize("name", USED)
def test_the_tiny_model_runs(name: str, root: Path) -> None:
    conversation = cases(name)["one_image" if FAMILIES[name].images else "text"]
    assert torch.isfinite(forward(name, conversation, root))
