"""The ids of many families are those of their own processor; the reference is transformers alone."""

import importlib.util
import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.config.schema import Config
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store import open_store
from mmtrain.dataset.validate import LengthLimit, check_samples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.errors import UserError
from mmtrain.inspect_labels.view import view_sample
from mmtrain.model.load import load_model
from mmtrain.model.packing_trial import try_rows
from mmtrain.progress import QUIET
from mmtrain.records.chat import Conversation, SampleError
from support.builders import write_jsonl
from support.family_reference import (
    FAMILIES,
    as_messages,
    as_rows,
    conversations,
    directory,
    given_template,
    is_usable,
    own_ids,
    prompted_inputs,
    save_images,
    tokenizer_of,
)

# GLM-4V's processor hands a tensor to `np.array`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.slow("every family of models; tests/test_labels.py has a few"),
]

USABLE = [name for name in FAMILIES if is_usable(name)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@cache
def encoder(name: str) -> Encoder:
    return Encoder(load_processor(str(directory(name)), ProcessorSettings(given_template(name))))


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


_NO_IMAGE = "takes no conversation without an image"
REFUSED = {
    **{("paligemma2", case): _NO_IMAGE for case in ("text", "system", "two_answers")},
    ("mllama", "system_and_image"): "Prompting with images is incompatible with system messages",
    ("perception_lm", "two_images"): "refuses images of 64x64, 120x50",
}
"""What the family's template allows no training on, and what the refusal says."""

ALONE = {
    ("qwen3_5", "two_answers"),
    ("qwen3_5_moe", "two_answers"),
    ("pixtral", "system"),
    ("pixtral", "system_and_image"),
    "llava_onevision",
    "paligemma2",
}
"""Cases and families whose template writes a reply in another way than for inference: each reply is a sequence of its
own, after the prompt for it."""

CASE_OF_FAMILY = [(name, case) for name in USABLE for case in conversations(name) if (name, case) not in REFUSED]


@pytest.mark.parametrize(("name", "case"), CASE_OF_FAMILY)
def test_ids_are_the_familys_own(name: str, case: str, root: Path) -> None:
    conversation = conversations(name)[case]
    messages = as_messages(name, conversation, root)
    found = [(turn, encoder(name).encode(one, root)) for turn, one in encoder(name).sequences(conversation)]
    if (name, case) in ALONE or name in ALONE:
        for turn, encoded in found:
            whole = messages if turn is None else messages[: turn + 1]
            assert prompted_inputs(name, whole, own_ids(name, whole), encoded) is not None
        return
    ((_, encoded),) = found
    ids, starts = without_added_ends(name, encoded)
    assert ids == own_ids(name, messages)
    replies = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [own_ids(name, messages[:turn], prompt=True) for turn in replies]
    assert [ids[:start] for start in starts] == prompts


@pytest.mark.parametrize(("name", "case"), [one for one in REFUSED if one[0] in USABLE])
def test_what_a_template_rules_out_is_refused(name: str, case: str, root: Path) -> None:
    with pytest.raises(SampleError, match=REFUSED[name, case]):
        encoder(name).encode(conversations(name)[case], root)


@pytest.mark.parametrize("name", USABLE)
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


@pytest.mark.parametrize("name", USABLE)
def test_a_trace_is_of_the_same_ids(name: str, root: Path) -> None:
    for case, conversation in conversations(name).items():
        if (name, case) not in REFUSED:
            for _, one in encoder(name).sequences(conversation):
                encoded = encoder(name).encode(one, root)
                traced = encoder(name).trace(one, encoded)
                assert traced.encoded.ids.tolist() == encoded.ids.tolist()
                assert len(traced.owners) == encoded.num_tokens


@pytest.mark.parametrize("name", USABLE)
def test_what_stops_generation_is_trained_on(name: str, root: Path) -> None:
    case = "one_image" if FAMILIES[name].images else "text"
    encoded = encoder(name).encode(conversations(name)[case], root)
    last = tokenizer_of(name).convert_ids_to_tokens(int(encoded.ids[encoded.supervised][-1]))
    assert last in (FAMILIES[name].eos, *FAMILIES[name].stops)


@pytest.mark.parametrize(
    ("name", "needs"),
    [(name, family.needs) for name, family in FAMILIES.items() if family.needs in ("torchvision", "num2words")],
)
def test_a_processor_that_needs_another_package_is_refused_by_its_name(name: str, needs: str) -> None:
    if importlib.util.find_spec(needs):
        pytest.skip(f"{needs} is installed")
    with pytest.raises(UserError, match=f"(?si){name}.*{needs}"):
        load_processor(str(directory(name)))


def written(name: str, root: Path, folder: Path) -> tuple[Config, list[Conversation]]:
    """A config over a file of the family's cases, and the cases."""
    tried = [found for case, found in conversations(name).items() if (name, case) not in REFUSED]
    data = write_jsonl(folder / "cases.jsonl", as_rows(tried))
    return Config.model_validate(
        {
            "model": {"path": str(directory(name)), "dtype": "float32", "chat_template": given_template(name)},
            "data": {"train": [{"path": str(data), "root": str(root)}]},
            "train": {"steps": 1},
            "run": {"output_dir": str(folder / "run")},
        }
    ), tried


@pytest.mark.parametrize("name", USABLE)
def test_training_reads_what_is_shown_and_what_the_family_makes(name: str, root: Path, tmp_path: Path) -> None:
    """The check before the first step finds no fault, and its ids are the family's own, sample by sample."""
    config, tried = written(name, root, tmp_path)
    spec, processor = EncodingSpec.of(config, config.data.train), encoder(name).processor
    trained, _ = check_samples(spec, processor, LengthLimit(10_000, "data.max_length"))
    store = open_store(spec, spec.records(), processor, QUIET)
    assert set(store.records.tolist()) == set(range(len(tried)))
    shown = StoredSamples(spec.records().sequences(store.records, store.turns), store)
    for index in range(len(shown)):
        encoded, view = trained.encoded(index), view_sample(shown, spec.encoder(processor), index)
        assert [token.id for token in view.tokens] == encoded.ids.tolist()
        assert [token.supervised for token in view.tokens] == encoded.supervised.tolist()
        messages = as_messages(name, shown.records.conversation(index), root)
        whole = own_ids(name, messages)
        if without_added_ends(name, encoded)[0] != whole:
            assert name in {one if isinstance(one, str) else one[0] for one in ALONE}
            assert prompted_inputs(name, messages, whole, encoded) is not None


def test_gemma4_whose_images_are_attended_to_both_ways_is_not_packed(tmp_path: Path) -> None:
    """As in its larger models."""
    path = tmp_path / "gemma4-both-ways"
    shutil.copytree(directory("gemma4"), path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["use_bidirectional_attention"] = "vision"
    (path / "config.json").write_text(json.dumps(config))
    processor = load_processor(str(path))
    found = try_rows(load_model(str(path), "float32", processor), processor, torch.float32)
    assert found.fault is not None
    assert not found.alone
