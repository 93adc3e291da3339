"""Every family takes its first step as plain transformers and peft take it; docs/models.md says so."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.generate.prompts import prompt_for
from mmtrain.generate.replies import Generator
from mmtrain.generate.sampling import Sampling
from mmtrain.records.chat import Conversation
from support.family_proof import plain, prove
from support.family_reference import (
    FAMILIES,
    as_messages,
    conversation_of,
    directory,
    given_template,
    is_usable,
    own_ids,
    own_inputs,
    save_images,
)
from support.family_table import row, table
from support.real_models import REAL, other_ids, real_column, real_files

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.slow("one step of every family of models, three ways; tests/test_cuts.py has a few"),
]


ALONE_IN_A_BATCH = {
    *("mllama", "perception_lm", "ernie4_5_vl_moe"),  # their images are laid out for one sample
    "phi4_multimodal",  # SDPA attends causally to the patches of an image without padding, unless another has some
}
"""Families that take one sample at a time."""

CANNOT_PACK = {
    *("gemma3", "paligemma2"),  # images, or prompts, attended to in both directions
    *("mamba2", "bamba", "minimax", "recurrent_gemma", "rwkv", "xlstm", "qwen3_5_moe", "lfm3_vl"),
    *("bloom", "mpt"),  # distances between tokens in a mask of their own
    *("nemotron", "stablelm"),  # attention of their own
    "doge",  # attention that chooses tokens by a mask of its own
    *("qwen3_5", "qwen3_next", "granitemoehybrid", "jamba", "mamba", "falcon_mamba", "falcon_h1", "nemotron_h"),
    *("lfm2", "lfm2_vl"),  # convolutions; those before are recurrent
    "gpt_oss",  # attention that gets no positions
    "hunyuan_vl",  # positions of its own form
    *ALONE_IN_A_BATCH,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_is_that_of_plain_transformers(name: str, root: Path, tmp_path: Path) -> None:
    """And the page says what was found."""
    if not is_usable(name):
        pytest.skip(f"needs {FAMILIES[name].needs}")
    proof = prove(name, root, tmp_path)
    assert proof.failures == []
    assert proof.packed is (name not in CANNOT_PACK)
    assert any("one sample at a time" in line for line in proof.lines) is (name in ALONE_IN_A_BATCH)
    assert table()[name] == row(name, proof)


@pytest.mark.parametrize("published", REAL)
def test_ids_of_published_tokenizers_and_templates_are_the_familys_own(published: str, root: Path) -> None:
    if not real_files(published).exists():
        pytest.skip(f"{real_files(published).name} is not here")
    assert other_ids(published, root) == []
    name = REAL[published]
    assert f"| {real_column(name)} |" in table()[name]


def test_the_page_has_every_family() -> None:
    assert table().keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", ["recurrent_gemma", "xlstm"])
def test_a_model_whose_cache_fails_replies_without_one(name: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, model = Encoder(load_processor(str(directory(name)))), plain(name)
    asked = conversation_of("two_answers").messages[:3]
    prompt = prompt_for(encoder, Conversation(asked), root)
    (reply,) = Generator(model, encoder, nullcontext).replies([prompt], Sampling(max_new_tokens=4))
    ids = own_ids(name, as_messages(name, Conversation(asked), root), prompt=True)
    for _ in range(len(reply.ids)):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert list(reply.ids) == ids[-len(reply.ids) :]
    assert reply.ids
    assert "generation: without a cache of earlier tokens, slower: " in caplog.text


@pytest.mark.parametrize("name", ["mllama", "perception_lm", "phi4_multimodal"])
def test_prompts_of_a_batch_get_the_replies_of_plain_transformers_where_each_goes_alone(name: str, root: Path) -> None:
    if not is_usable(name):
        pytest.skip(f"needs {FAMILIES[name].needs}")
    encoder, model = Encoder(load_processor(str(directory(name)))), plain(name)
    generator = Generator(model, encoder, nullcontext, alone=lambda: True)
    given = [conversation_of(case).messages for case in ("one_image", "between", "text")]
    asked = [Conversation(messages[:-1]) for messages in given]
    found = generator.replies([prompt_for(encoder, one, root) for one in asked], Sampling(max_new_tokens=8))
    for reply, one in zip(found, asked, strict=True):
        messages = as_messages(name, one, root)
        inputs = own_inputs(name, messages, add_generation_prompt=True, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert list(reply.ids) == expected.tolist()[: len(reply.ids)]
        assert len(reply.ids) > 1


@pytest.mark.parametrize("name", ["paligemma2", "llava_onevision", "qwen3_5", "janus"])
def test_greedy_replies_are_those_of_plain_transformers(name: str, root: Path) -> None:
    """Also where a reply follows the prompt in another way than the template writes it, one reply after another, and
    where the model's own `generate` leaves out the logits processors."""
    processor = load_processor(str(directory(name)), ProcessorSettings(given_template(name)))
    encoder = Encoder(processor)
    first, second = (conversation_of(case).messages for case in ("one_image", "two_answers"))
    asked = Conversation((*first, second[2]))
    inputs = own_inputs(name, as_messages(name, asked, root), add_generation_prompt=True, return_tensors="pt")
    model = plain(name)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    generator = Generator(model, encoder, nullcontext)
    (reply,) = generator.replies([prompt_for(encoder, asked, root)], Sampling(max_new_tokens=8))
    assert list(reply.ids) == expected.tolist()[: len(reply.ids)]
    assert len(reply.ids) > 1
