"""The ids of many families are those of their own processor; the reference is transformers alone."""

import importlib.util
import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.auto.processing_auto import processor_class_from_name

from mmtrain.config.schema import Config
from mmtrain.dataset.encode_all import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store import open_store
from mmtrain.dataset.validate import LengthLimit, check_samples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.view import view_sample
from mmtrain.model.load import load_model
from mmtrain.model.packing_trial import packing_fault
from mmtrain.progress import QUIET
from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text
from support.builders import write_jsonl
from support.families_grid import GRID
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import make_family

# GLM-4V's processor hands a tensor to `np.array`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.slow("every family of models; tests/test_labels.py has a few"),
]

FAMILIES = {**GRID, **TILE, **TEXT_ONLY}
USABLE = [name for name, family in FAMILIES.items() if family.needs is None]

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


def conversations(name: str) -> dict[str, Conversation]:
    """What a family is tried with, by the name of the case."""
    made = {}
    for case, turns in CASES.items():
        messages = [
            Message(role, tuple(part if isinstance(part, Image) else Text(part) for part in parts))
            for role, parts in turns
        ]
        made[case] = Conversation(tuple(messages))
    return {case: one for case, one in made.items() if FAMILIES[name].images or not one.images}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, (name, size) in enumerate(IMAGES.items()):
        PIL.Image.new("RGB", size, (200, 90 * i, 40)).save(folder / name)
    return folder


_homes: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    _homes.append(tmp_path_factory.mktemp("families"))


@cache
def directory(name: str) -> Path:
    return make_family(FAMILIES[name], _homes[0] / name)


@cache
def encoder(name: str) -> Encoder:
    return Encoder(load_processor(str(directory(name))))


@cache
def reference(name: str) -> Any:
    """The family's own processor, or the tokenizer of a text model; its parts for video and sound are left out."""
    path = directory(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = FIXED_DATE + tokenizer.chat_template
    if not FAMILIES[name].images:
        return tokenizer
    settings = json.loads((path / "processor_config.json").read_text())
    family = processor_class_from_name(settings.pop("processor_class"))
    parts = {"tokenizer": tokenizer, "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil")}

    class WithoutVideo(family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    made = {part: parts.get(part) for part in family.get_attributes()}
    return WithoutVideo(**made, chat_template=tokenizer.chat_template, **settings)


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
    return dict(reference(name).apply_chat_template(messages, tokenize=True, return_dict=True, **options))


def own_ids(name: str, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
    """The family's own ids; with `prompt` those that a reply to `messages` follows."""
    ids = own_inputs(name, messages, add_generation_prompt=prompt)["input_ids"]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return list(ids[0] if isinstance(ids[0], list) else ids)


def runs(encoded: Encoded) -> list[tuple[int, int]]:
    """(start, end) of each stretch that is trained on."""
    flags = [False, *encoded.supervised.tolist(), False]
    borders = [i for i, (one, two) in enumerate(itertools.pairwise(flags)) if one != two]
    return list(zip(borders[::2], borders[1::2], strict=True))


def without_added_ends(name: str, encoded: Encoded) -> tuple[list[int], list[int]]:
    """The ids, and where each reply starts, less the end tokens put after replies that the template leaves open."""
    open_ended, eos = FAMILIES[name].unended, tokenizer_of(name).convert_tokens_to_ids(FAMILIES[name].eos)
    added = [end - 1 for _, end in runs(encoded)]
    added = added if open_ended == "each" else added[-1:] if open_ended == "last" else []
    assert all(encoded.ids[at] == eos for at in added)
    starts = [start - sum(at < start for at in added) for start, _ in runs(encoded)]
    return [token for at, token in enumerate(encoded.ids.tolist()) if at not in added], starts


def loss(name: str, case: str, root: Path) -> torch.Tensor:
    """Of the tiny model, on what the family's own processor gives."""
    inputs = own_inputs(name, as_messages(name, conversations(name)[case], root), return_tensors="pt")
    auto = AutoModelForImageTextToText if FAMILIES[name].images else AutoModelForCausalLM
    model = auto.from_pretrained(directory(name))
    labels = inputs["input_ids"].clone()
    labels[labels >= AutoConfig.from_pretrained(directory(name)).get_text_config().vocab_size] = -100
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, labels=labels).loss
    return found


REFUSED = {
    ("qwen3_5", "two_answers"): "rewrites turn 2 once others follow",
}
"""What the family's template allows no training on, and what the refusal says."""

REFUSED_AT_START = {
    "mllama": "another 'cross_attention_mask' for a probe conversation with one image",
    "llava_onevision": "does not begin turn 2 as its generation prompt does",
    "hunyuan_vl": "refuses an image of 64x64",
}
"""Families that mmtrain cannot train, and what the refusal says."""
USED = [name for name in USABLE if name not in REFUSED_AT_START]


CASE_OF_FAMILY = [(name, case) for name in USED for case in conversations(name) if (name, case) not in REFUSED]


@pytest.mark.parametrize(("name", "case"), CASE_OF_FAMILY)
def test_ids_are_the_familys_own(name: str, case: str, root: Path) -> None:
    conversation = conversations(name)[case]
    messages = as_messages(name, conversation, root)
    encoded = encoder(name).encode(conversation, root)
    ids, starts = without_added_ends(name, encoded)
    assert ids == own_ids(name, messages)
    replies = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [own_ids(name, messages[:turn], prompt=True) for turn in replies]
    assert [ids[:start] for start in starts] == prompts


@pytest.mark.parametrize("name", REFUSED_AT_START)
def test_a_family_that_cannot_be_trained_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .*{REFUSED_AT_START[name]}"):
        load_processor(str(directory(name)))


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_what_a_template_rules_out_is_refused(name: str, case: str, root: Path) -> None:
    with pytest.raises(SampleError, match=REFUSED[name, case]):
        encoder(name).encode(conversations(name)[case], root)


@pytest.mark.parametrize("name", USED)
def test_encoding_many_gives_what_encoding_one_gives(name: str, root: Path) -> None:
    def plain(found: Encoded | SampleError) -> Any:
        return str(found) if isinstance(found, SampleError) else (found.ids.tolist(), found.supervised.tolist())

    def one(conversation: Conversation) -> Encoded | SampleError:
        try:
            return encoder(name).encode(conversation, root)
        except SampleError as error:
            return error

    tried = conversations(name).values()
    many = encoder(name).encode_many([(conversation, root) for conversation in tried])
    assert [plain(found) for found in many] == [plain(one(conversation)) for conversation in tried]


@pytest.mark.parametrize("name", USED)
def test_a_trace_is_of_the_same_ids(name: str, root: Path) -> None:
    for case, conversation in conversations(name).items():
        if (name, case) not in REFUSED:
            encoded = encoder(name).encode(conversation, root)
            traced = encoder(name).trace(conversation, encoded)
            assert traced.encoded.ids.tolist() == encoded.ids.tolist()
            assert len(traced.owners) == encoded.num_tokens


@pytest.mark.parametrize("name", USED)
def test_what_stops_generation_is_trained_on(name: str, root: Path) -> None:
    encoded = encoder(name).encode(conversations(name)["text"], root)
    last = tokenizer_of(name).convert_ids_to_tokens(int(encoded.ids[encoded.supervised][-1]))
    assert last in (FAMILIES[name].eos, *FAMILIES[name].stops)


@pytest.mark.parametrize(
    ("name", "needs"),
    [(name, family.needs) for name, family in FAMILIES.items() if family.needs and name not in ("minicpmv4_6",)],
)
def test_a_processor_that_needs_another_package_is_refused_by_its_name(name: str, needs: str) -> None:
    if importlib.util.find_spec(needs):
        pytest.skip(f"{needs} is installed")
    with pytest.raises(UserError, match=f"(?si){name}.*{needs}"):
        load_processor(str(directory(name)))


@pytest.mark.parametrize("name", USABLE)
def test_the_tiny_model_runs(name: str, root: Path) -> None:
    assert torch.isfinite(loss(name, "one_image" if FAMILIES[name].images else "text", root))


def written(name: str, root: Path, folder: Path) -> tuple[Config, list[Conversation]]:
    """A config over a file of the family's cases, and the cases."""
    tried = [found for case, found in conversations(name).items() if (name, case) not in REFUSED]
    rows = []
    for conversation in tried:
        messages = [
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
        rows.append({"messages": messages})
    data = write_jsonl(folder / "cases.jsonl", rows)
    return Config.model_validate(
        {
            "model": {"path": str(directory(name)), "dtype": "float32"},
            "data": {"train": [{"path": str(data), "root": str(root)}]},
            "train": {"steps": 1},
            "run": {"output_dir": str(folder / "run")},
        }
    ), tried


@pytest.mark.parametrize("name", USED)
def test_training_reads_what_is_shown_and_what_the_family_makes(name: str, root: Path, tmp_path: Path) -> None:
    """The check before the first step finds no fault, and its ids are the family's own, sample by sample."""
    config, tried = written(name, root, tmp_path)
    spec, processor = EncodingSpec.of(config, config.data.train), encoder(name).processor
    trained, _ = check_samples(spec, processor, LengthLimit(10_000, "data.max_length"))
    records = spec.records()
    shown = StoredSamples(records, open_store(spec, records, processor, QUIET))
    for index, conversation in enumerate(tried):
        encoded, view = trained.encoded(index), view_sample(shown, spec.encoder(processor), index)
        assert [token.id for token in view.tokens] == encoded.ids.tolist()
        assert [token.supervised for token in view.tokens] == encoded.supervised.tolist()
        assert without_added_ends(name, encoded)[0] == own_ids(name, as_messages(name, conversation, root))


CANNOT_PACK = {"gemma3", "gemma4 both ways", "qwen3_5", "gpt_oss", "lfm2", "falcon_mamba"}
"""Images attended to in both directions, recurrent layers, convolutions, and attention that gets no positions."""


@cache
def both_ways() -> Path:
    """Gemma 4 as the larger models are: its images are attended to in both directions."""
    path = _homes[0] / "gemma4-both-ways"
    shutil.copytree(directory("gemma4"), path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["use_bidirectional_attention"] = "vision"
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", [*USED, "gemma4 both ways"])
def test_packing_is_found_out(name: str) -> None:
    path = both_ways() if name == "gemma4 both ways" else directory(name)
    processor = load_processor(str(path))
    fault = packing_fault(load_model(str(path), "float32", processor), processor, torch.float32)
    assert (fault is not None) == (name in CANNOT_PACK), fault
