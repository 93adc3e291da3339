"""Generation against a loop of full forwards, and prompts against the samples that training encodes."""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mmtrain.config.data_section import Source
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.images import decode
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.generate.prompts import prompt_for, prompts_of, trained_end
from mmtrain.generate.replies import Generator, Reply
from mmtrain.generate.sampling import Sampling
from mmtrain.model.load import load_model
from mmtrain.records.chat import Conversation
from mmtrain.records.record_set import RecordSet
from support.attention_models import PRETRAINED, make_text_family
from support.builders import mixed_rows, write_jsonl
from support.families_grid import GRID
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import make_family
from support.fresh_samples import FreshSamples

ALL_FAMILIES = {**GRID, **TILE, **TEXT_ONLY}
FAMILIES = (
    *("qwen3_vl", "gemma3", "gemma4", "aya_vision", "idefics3", "internvl", "llava_next"),
    *("cohere2", "gpt_oss", "lfm2", "granite"),
)
GREEDY = Sampling(max_new_tokens=6)


class Case:
    """A model, and the prompts of the mixed samples."""

    def __init__(self, path: Path, folder: Path, with_images: bool) -> None:
        data = write_jsonl(folder / "mixed.jsonl", mixed_rows(folder, with_images))
        processor = load_processor(str(path))
        self.encoder = Encoder(processor)
        self.model = load_model(str(path), "float32", processor)
        self.samples = FreshSamples(RecordSet([Source(path=str(data))]), self.encoder)
        self.encoded = [self.samples.encoded(index) for index in range(len(self.samples))]
        self.prompts = [prompt for encoded in self.encoded for prompt in prompts_of(encoded)]
        self.generator = Generator(self.model, self.encoder, nullcontext)

    def greedy(self, prompt: Encoded, num: int) -> list[int]:
        """The most likely tokens, by full forwards without a cache, up to the first that ends a reply."""
        return by_full_forwards(self.model, self.encoder, prompt, num, self.generator.stop_ids)


@torch.no_grad()
def by_full_forwards(model: Any, encoder: Encoder, prompt: Encoded, num: int, stop_ids: frozenset[int]) -> list[int]:
    processor = encoder.processor
    images = [decode(span.image) for span in prompt.images]
    inputs: dict[str, Any] = processor.image_inputs([images])[0] if images else {}
    known = inspect.signature(model.forward).parameters
    ids: list[int] = prompt.ids.tolist()
    for _ in range(num):
        tensor = torch.tensor([ids])
        types = torch.tensor([[int(id_ == processor.image_token_id) for id_ in ids]])
        extra = {key: types for key in ("mm_token_type_ids", "token_type_ids") if key in known}
        logits = model(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False, **inputs, **extra)
        ids.append(int(logits.logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[prompt.num_tokens :]


@pytest.fixture(scope="module")
def case(kind: str, model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(model_dirs[kind], tmp_path_factory.mktemp("data"), with_images=kind != "text")


def test_a_prompt_is_what_training_has_before_the_reply(case: Case) -> None:
    """Asked again without its reply, each turn gets the ids that the encoded sample has before it."""
    numbers = []
    for index, encoded in enumerate(case.encoded):
        conversation, root = case.samples.records.conversation(index), case.samples.records.roots(index)
        turns = [turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"]
        prompts = prompts_of(encoded)
        assert len(prompts) == len(turns)
        for turn, prompt in zip(turns, prompts, strict=True):
            asked = prompt_for(case.encoder, Conversation(conversation.messages[:turn]), root)
            assert asked.ids.tolist() == prompt.ids.tolist() == encoded.ids[: prompt.num_tokens].tolist()
            assert encoded.supervised[prompt.num_tokens]
            assert len(asked.images) == len(prompt.images)
            numbers.append((len(prompts), len(prompt.images)))
    with_images = case.encoder.processor.images is not None
    assert {images for _, images in numbers} == ({0, 1, 2} if with_images else {0})
    assert {replies for replies, _ in numbers} == {1, 2, 3}


def test_greedy_is_a_loop_of_full_forwards(case: Case) -> None:
    replies = [reply.ids for reply in case.generator.replies(case.prompts, GREEDY)]
    assert [list(ids) for ids in replies] == [case.greedy(prompt, 6) for prompt in case.prompts]


@pytest.mark.slow("eleven families of models; the three kinds are always tried")
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_a_loop_of_full_forwards_in_many_families(name: str, tmp_path: Path) -> None:
    family = ALL_FAMILIES[name]
    case = Case(make_family(family, tmp_path / name), tmp_path / "data", with_images=bool(family.images))
    replies = [list(reply.ids) for reply in case.generator.replies(case.prompts, GREEDY)]
    assert replies == [case.greedy(prompt, 6) for prompt in case.prompts]
    assert len({tuple(ids) for ids in replies}) > 3


def test_a_batch_of_1_gives_what_a_batch_of_16_gives(case: Case) -> None:
    together = case.generator.replies(case.prompts, GREEDY)
    alone = [case.generator.replies([prompt], GREEDY)[0] for prompt in case.prompts]
    assert [plain(reply) for reply in together] == [plain(reply) for reply in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-4)


def test_prompts_with_images_go_one_by_one_through_a_model_that_takes_no_more(case: Case) -> None:
    """And are sampled as in batches of one."""
    rows: list[int] = []
    hook = case.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampling = Sampling(max_new_tokens=4, do_sample=True, temperature=1.5, seed=3)
    generator = Generator(case.model, case.encoder, nullcontext, alone=lambda: True)
    found = generator.replies(case.prompts, sampling, seed=5)
    hook.remove()
    has_images = any(prompt.images for prompt in case.prompts)
    assert set(rows[1:]) == {1 if has_images else len(case.prompts)}  # after the trial of the frequencies
    if has_images:
        expected = [generator.replies([prompt], sampling, seed=5 + n)[0] for n, prompt in enumerate(case.prompts)]
        assert found == expected


def test_prompts_that_would_change_each_others_frequencies_go_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two get the replies that each gets alone, in one batch or one by one, whichever of them is tried first."""
    path = make_text_family("phi3", tmp_path / "phi3")
    encoder = Encoder(load_processor(str(path)))
    model = load_model(str(path), "float32", encoder.processor)
    noise = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 90, (size,), generator=noise).tolist() for size in (20, PRETRAINED + 4)]
    prompts = [Encoded(np.array(ids, np.int32), np.zeros(len(ids), np.bool_), ()) for ids in texts]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    for asked in (prompts, prompts[::-1]):
        found = Generator(model, encoder, nullcontext).replies(asked, GREEDY)
        expected = [by_full_forwards(model, encoder, prompt, 6, frozenset()) for prompt in asked]
        assert [list(reply.ids) for reply in found] == [
            ids[: len(r.ids)] for ids, r in zip(expected, found, strict=True)
        ]
    assert set(rows) == {1}
    generator = Generator(model, encoder, nullcontext)
    generator.replies([prompts[0]] * 2, GREEDY)
    assert rows[-1] == 2
    assert f"more than {PRETRAINED} tokens with their reply go alone" in caplog.text


def plain(reply: Reply) -> tuple[str, tuple[int, ...], bool]:
    return reply.text, reply.ids, reply.is_complete


def test_a_reply_stops_at_the_token_that_was_trained(case: Case) -> None:
    end = trained_end(case.encoder)
    (first, second) = case.generator.replies(case.prompts[:1], GREEDY)[0].ids[:2]
    assert end in case.generator.stop_ids
    assert first != second
    case.generator.stop_ids |= {second}
    stopped = case.generator.replies(case.prompts[:1], GREEDY)[0]
    case.generator.stop_ids -= {second}
    assert stopped.ids == (first, second)
    assert stopped.is_complete
    assert stopped.text == case.encoder.processor.tokenizer.decode([first]).strip()


def test_the_models_own_generation_config_is_not_inherited(case: Case) -> None:
    expected = case.generator.replies(case.prompts, GREEDY)
    first = expected[0].ids[0]
    own = case.model.generation_config
    case.model.generation_config = GenerationConfig(
        repetition_penalty=3.0, suppress_tokens=[first], eos_token_id=first, do_sample=True, temperature=9.0
    )
    found = case.generator.replies(case.prompts, GREEDY)
    assert case.model.generation_config.repetition_penalty == 3.0
    case.model.generation_config = own
    assert [reply.ids for reply in found] == [reply.ids for reply in expected]


def test_the_log_probability_is_the_mean_over_the_reply(case: Case) -> None:
    prompt = case.prompts[1]
    reply = case.generator.replies(case.prompts[:2], GREEDY)[1]
    ids = prompt.ids.tolist()
    found = []
    assert not prompt.images
    for id_ in reply.ids:
        with torch.no_grad():
            logits = case.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[id_]))
        ids.append(id_)
    assert reply.log_probability == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_sampling_follows_the_seed(case: Case) -> None:
    def sampled(seed: int) -> list[tuple[int, ...]]:
        options = Sampling(max_new_tokens=6, do_sample=True, temperature=1.5, seed=seed)
        return [reply.ids for reply in case.generator.replies(case.prompts, options)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_prompt_without_room_for_its_reply_is_refused(case: Case) -> None:
    generator = Generator(case.model, case.encoder, nullcontext, case.prompts[0].num_tokens + 5)
    with pytest.raises(UserError, match=f"a prompt has {case.prompts[0].num_tokens} tokens .* expected at most 5"):
        generator.replies(case.prompts[:1], GREEDY)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("temperature", Sampling(temperature=1.0)),
        ("top-p", Sampling(top_p=1.0)),
        ("top-k", Sampling(top_k=1)),
    ],
)
def test_an_option_without_effect_is_refused(name: str, sampling: Sampling) -> None:
    with pytest.raises(UserError, match=f"--{name} 1.*without --do-sample"):
        sampling.check()
