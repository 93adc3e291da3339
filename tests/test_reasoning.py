"""Replies with reasoning, on templates that drop it from earlier turns: each is trained on as inference would see it.

Expected are transformers' `apply_chat_template` on the turns before a reply, and the reply as it is written by hand.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mmtrain.answers.judged import JudgedAnswers
from mmtrain.answers.scored_questions import choose_metrics
from mmtrain.checks.labels import Checker
from mmtrain.cli import app
from mmtrain.config.schema import Config
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.store import open_store
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor, processor_of
from mmtrain.encoding.processor import EncodingTrial
from mmtrain.generate.prompts import prompt_for, prompts_for_all
from mmtrain.generate.questions import Question
from mmtrain.progress import QUIET
from mmtrain.records.chat import Conversation, Message, SampleError, Text
from mmtrain.records.reasoning import split_reasoning, without_reasoning
from mmtrain.train.dataset import Dataset
from mmtrain.train.report import data_line
from support.builders import write_jsonl
from support.fresh_samples import FreshSamples
from support.label_models import OTHER_TEMPLATES, TEMPLATES, make_directory
from support.learning import learner_for, relative_l2, step_of


def _chatml(reply: str, prompt: str) -> str:
    """`r` is the reasoning of a turn, `c` what follows it; `last` is the last question's position."""
    return (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set last = ns.last %}"
        "{% set c = m.content %}{% set r = '' %}{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
        "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
        "{% if m.role == 'assistant' %}" + reply + "{% else %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


_OPEN, _END = "<|im_start|>assistant\n", "{{ c }}<|im_end|>\n"
_SHOWN = "{% if loop.index0 > last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
GLM = "<|im_start|>assistant\n<think>{% if loop.index0 > last %}{{ r }}{% endif %}</think>\n"
QWEN3 = OTHER_TEMPLATES["qwen3"].text
"""In the manner of GLM-4.5, Qwen3 and, below, Qwen3's thinking models, and DeepSeek-R1 and Nemotron, which drop the
reasoning of every reply and open it in the prompt; Qwen3.5 in its mode without."""


@dataclass(frozen=True)
class Case:
    template: str
    first: str
    """What the model has to write for the first reply, and then for the second."""
    second: str


CASES = {
    "qwen3": Case(QWEN3, "<think>\nhm\n</think>\n\none<|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>"),
    "glm": Case(
        _chatml(GLM + _END, "<|im_start|>assistant"),
        "\n<think>hm</think>\none<|im_end|>",
        "\n<think>so</think>\ntwo<|im_end|>",
    ),
    "thinks in the prompt": Case(
        _chatml(_OPEN + _SHOWN + _END, _OPEN + "<think>\n"),
        "hm\n</think>\n\none<|im_end|>",
        "so\n</think>\n\ntwo<|im_end|>",
    ),
    "opens it twice": Case(
        _chatml(
            _OPEN + "{% if loop.last %}{{ '<think>\n' + m.content }}{% else %}{{ c }}{% endif %}<|im_end|>\n",
            _OPEN + "<think>\n",
        ),
        "hm\n</think>\n\none<|im_end|>",
        "so\n</think>\n\ntwo<|im_end|>",
    ),
    "drops all": Case(
        _chatml(_OPEN + _END, _OPEN + "<think>\n"), "hm\n</think>\n\none<|im_end|>", "so\n</think>\n\ntwo<|im_end|>"
    ),
    "drops all, opens nothing": Case(
        _chatml(_OPEN + _END, _OPEN), "<think>\nhm\n</think>\n\none<|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>"
    ),
}
NOT_THINKING = _chatml(_OPEN + _SHOWN + _END, _OPEN + "<think>\n\n</think>\n\n")
TURNS = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\none"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\ntwo"},
]


def talk(turns: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(Message(turn["role"], (Text(turn["content"]),)) for turn in turns))


_home: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _home.append(tmp_path_factory.mktemp("reasoning"))


@cache
def directory(template: str) -> Path:
    return make_directory(_home[-1] / str(abs(hash(template))), "byte_level", template)


@cache
def encoder(template: str, train_on: str = "assistant") -> Encoder:
    return Encoder(load_processor(str(directory(template))), train_on)


def prompt_ids(template: str, turns: list[dict[str, Any]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory(template))
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def parted(template: str, encoded: Encoded) -> tuple[list[int], str]:
    """The ids before what is trained on, and the text of that."""
    start = int(encoded.supervised.argmax())
    return encoded.ids[:start].tolist(), AutoTokenizer.from_pretrained(directory(template)).decode(
        encoded.ids[encoded.supervised]
    )


@pytest.mark.parametrize("name", CASES)
def test_each_reply_is_trained_on_after_the_prompt_of_inference(name: str) -> None:
    case = CASES[name]
    found = encoder(case.template).sequences(talk(TURNS))
    assert [turn for turn, _ in found] == [1, 3]
    encoded = [encoder(case.template).encode(one, Path()) for _, one in found]
    parts = [parted(case.template, one) for one in encoded]
    assert parts[0] == (prompt_ids(case.template, TURNS[:1]), case.first)
    assert parts[1] == (prompt_ids(case.template, TURNS[:3]), case.second)
    assert "hm" not in AutoTokenizer.from_pretrained(directory(case.template)).decode(encoded[1].ids)
    prompts = [prompt.ids.tolist() for prompt in prompts_for_all(encoder(case.template), talk(TURNS), Path())]
    assert prompts == [ids for ids, _ in parts]
    assert prompt_for(encoder(case.template), talk(TURNS[:3]), Path()).ids.tolist() == parts[1][0]


def test_the_trial_at_the_start_says_which_replies_are_alone() -> None:
    trial = encoder(QWEN3).processor.trial
    assert trial == EncodingTrial(["no image", "no image and two replies", "a system turn"], [], {})
    trial = encoder(CASES["drops all"].template).processor.trial
    assert trial == EncodingTrial([], ["no image", "no image and two replies", "a system turn"], {})
    refusing = QWEN3.replace(
        "{% for m in messages %}{% set c", "{% for m in messages if 1 / (m.role != 'system') %}{% set c"
    )
    trial = encoder(refusing).processor.trial
    assert trial is not None
    assert trial.equal == ["no image", "no image and two replies"]
    assert "division by zero" in trial.refused["a system turn"]
    assert list(trial.lines()) == [
        "equal the model's own with no image, no image and two replies",
        f"refused with a system turn: {trial.refused['a system turn']}",
    ]
    assert list(trial.summary()) == [
        "equal the model's own in 2 of 3 trial conversations, which inspect-model names",
        f"refused with a system turn: {trial.refused['a system turn']}",
    ]


@pytest.mark.parametrize("name", CASES)
def test_only_the_last_reply_is_one_sequence(name: str) -> None:
    case = CASES[name]
    ((turn, one),) = encoder(case.template, "last").sequences(talk(TURNS))
    assert turn is None
    encoded = encoder(case.template, "last").encode(one, Path())
    assert parted(case.template, encoded) == (prompt_ids(case.template, TURNS[:3]), case.second)


def test_reasoning_that_is_written_otherwise_is_spaced_as_the_template_does() -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>one"}]
    encoded = encoder(QWEN3).encode(talk(turns), Path())
    assert parted(QWEN3, encoded) == (prompt_ids(QWEN3, TURNS[:1]), CASES["qwen3"].first)


def test_a_template_that_knows_no_reasoning_keeps_a_conversation_together() -> None:
    plain = TEMPLATES["chatml"].text
    ((turn, one),) = encoder(plain).sequences(talk(TURNS))
    encoded = encoder(plain).encode(one, Path())
    tokenizer = AutoTokenizer.from_pretrained(directory(plain))
    assert turn is None
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)


def test_replies_without_reasoning_stay_together_too() -> None:
    turns = [{**turn, "content": turn["content"].rpartition("\n")[2]} for turn in TURNS]
    assert [turn for turn, _ in encoder(QWEN3).sequences(talk(turns))] == [None]


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [
        (
            NOT_THINKING,
            "<think>\nhm\n</think>\n\none",
            "turn 2 has reasoning, and the prompt for it ends with </think>",
        ),
        (CASES["drops all"].template, "one", "turn 2 has no reasoning, and the prompt for it ends with <think>"),
        (QWEN3, "so <think>\nhm\n</think>\n\none", "rewrites the conversation|changes the text"),
    ],
)
def test_replies_that_do_not_fit_the_prompt_are_refused(template: str, content: str, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encoder(template).encode(talk([TURNS[0], {"role": "assistant", "content": content}]), Path())


@pytest.mark.parametrize("name", [*CASES, "on its own line"])
def test_the_checks_find_no_fault_in_it(name: str) -> None:
    """Nor where the template writes a line break before the token that ends a reply."""
    template = QWEN3.replace("<|im_end|>", "\n<|im_end|>") if name == "on its own line" else CASES[name].template
    own, checker = encoder(template), Checker(encoder(template).processor)
    for _, one in own.sequences(talk(TURNS)):
        encoded = own.encode(one, Path())
        labels = np.where(encoded.supervised, encoded.ids, -100)
        assert checker.check(encoded.ids, labels, one, []) == []
        last = max(at for at, label in enumerate(labels) if label >= 0 and label != labels[-1])
        labels[last - 1] = -100
        assert any(finding.is_fault for finding in checker.check(encoded.ids, labels, one, []))


def test_reasoning_is_taken_from_the_beginning_of_a_text() -> None:
    assert split_reasoning("<think>a</think>b") == ("<think>", "a", "</think>", "b")
    assert split_reasoning(" \n<think>\na\n</think>\n\nb\n") == (" \n<think>\n", "a", "\n</think>\n\n", "b\n")
    assert split_reasoning("a</think>b") == ("", "a", "</think>", "b")
    assert split_reasoning("<think>\n\n</think>\nb") == ("<think>\n\n", "", "</think>\n", "b")
    assert split_reasoning("so <think>a</think>b") is None
    assert split_reasoning("<think>a</think>b</think>c") is None
    assert split_reasoning("<think>a") is None
    assert [m.text for m in without_reasoning(talk(TURNS)).messages] == ["1?", "one", "2?", "two"]
    with pytest.raises(SampleError, match=r"labels\.reasoning is drop, and it is not clear"):
        without_reasoning(talk([{"role": "assistant", "content": "so <think>a</think>b"}]))


def test_answers_are_scored_without_reasoning() -> None:
    """A reply that follows a prompt ending with `<think>` has only the closing mark."""
    question = Question(0, 1, 0, "what?", "<think>\nhm\n</think>\n\nblue")
    (asked,), reasons = choose_metrics([question], ["held-out"], {"held-out": None})
    assert (asked.reference, asked.metric) == ("blue", "exact_match")
    assert reasons["held-out"].startswith("most references have at most")
    answers = {"model": {0: "<think>is it red?</think>blue"}, "grey": {0: "so\n</think>\n\nblue"}, "none": {0: "red"}}
    scores = JudgedAnswers([asked], answers).scores
    assert [scores[kind]["exact_match"].tolist() for kind in answers] == [[1.0], [1.0], [0.0]]


@pytest.fixture
def config(make_config: Any, tmp_path: Path) -> Config:
    """A tiny model with Qwen3's template, and three conversations, of two, one and one replies."""
    (tmp_path / "qwen3.jinja").write_text(QWEN3)
    plain = [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "three"}]
    data = write_jsonl(tmp_path / "talks.jsonl", [{"messages": TURNS}, {"messages": plain}, {"messages": TURNS[:2]}])
    made = make_config("text", steps=2, batch_size=2).model_dump()
    made["model"]["chat_template"] = str(tmp_path / "qwen3.jinja")
    made["data"]["train"] = [{"path": str(data)}]
    return Config.model_validate(made)


def dataset_of(config: Config) -> Dataset:
    return Dataset(config, processor_of(config.model), QUIET)


def test_sequences_are_the_samples_of_a_run(config: Config) -> None:
    dataset = dataset_of(config)
    assert data_line(dataset).startswith("3 conversations gave 4 sequences, 0 images, ")
    assert [dataset.train.records.record(index) for index in range(4)] == [0, 0, 1, 2]
    assert [dataset.train.records.turn(index) for index in range(4)] == [1, 3, None, None]
    assert [dataset.train.place(index).line for index in range(4)] == [1, 1, 2, 3]
    assert dataset.plan.steps_per_epoch == 2  # batch_size counts sequences
    spec = EncodingSpec.of(config, config.data.train)
    fresh = FreshSamples(dataset.train.records, dataset.encoder)
    for index in range(4):
        assert fresh.encoded(index).ids.tolist() == dataset.train.encoded(index).ids.tolist()
    store = open_store(spec, spec.records(), dataset.encoder.processor, QUIET)
    assert (store.records.tolist(), store.turns.tolist()) == ([0, 0, 1, 2], [1, 3, -1, -1])
    assert not store.faults


def test_reasoning_is_dropped_where_the_config_says_so(config: Config) -> None:
    labels = config.labels.model_copy(update={"reasoning": "drop"})
    dataset = dataset_of(config.model_copy(update={"labels": labels}))
    assert data_line(dataset).startswith("3 samples, ")
    first = dataset.train.encoded(0)
    decode = dataset.encoder.processor.tokenizer.decode
    assert decode(first.ids[first.supervised].tolist()) == "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"


def test_a_step_of_sequences_is_the_same_packed_and_padded(config: Config) -> None:
    learner, dataset = learner_for(config)
    packed, gradients = step_of(learner, dataset, [[0, 1, 2, 3]], packing=True)
    for packing, cuts in ((False, [[0, 1, 2, 3]]), (True, [[1], [0, 3], [2]])):
        loss, others = step_of(learner, dataset, cuts, packing=packing)
        assert loss == pytest.approx(packed, rel=1e-5)
        assert relative_l2(others, gradients) < 1e-5


def test_the_sequences_of_a_conversation_stay_on_one_side_of_a_split(config: Config, tmp_path: Path) -> None:
    number = iter(range(99))
    rows = [
        {"messages": [{**turn, "content": turn["content"] + str(next(number))} for turn in TURNS]} for _ in range(8)
    ]
    data = {"train": [str(write_jsonl(tmp_path / "eight.jsonl", rows))], "eval": [{"from": "train", "share": 0.5}]}
    dataset = dataset_of(Config.model_validate(config.model_dump() | {"data": data}))
    trained = [dataset.train.records.record(index) for index in dataset.checked.used.tolist()]
    held_out = dataset.eval[0]
    scored = [held_out.samples.records.record(index) for index in held_out.checked.used.tolist()]
    assert sorted(trained + scored) == sorted([*range(8), *range(8)])
    assert set(trained).isdisjoint(scored)


def test_inspect_labels_shows_each_sequence(config: Config, tmp_path: Path) -> None:
    """The same ones before they are stored for training and after."""
    from mmtrain.config.load import dump_config

    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))

    def rows(*options: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, ["inspect-labels", str(file), "--json", "--tokens", *options])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    before = rows("--index", "2", "--index", "0")
    assert [(row["index"], row.get("turn")) for row in before] == [(2, None), (0, 1), (0, 3)]
    every = rows("--all")
    assert [(row["index"], row.get("turn")) for row in every] == [(0, 1), (0, 3), (1, None), (2, None)]
    assert rows("--index", "2", "--index", "0") == before == [every[3], *every[:2]]
    shown = ["".join(token["text"] for token in row["tokens"] if token["supervised"]) for row in every[:2]]
    assert shown == [CASES["qwen3"].first, CASES["qwen3"].second]
    result = CliRunner().invoke(app, ["inspect-labels", str(file), "--all"])
    assert "3 conversations gave 4 sequences" in result.stdout
    assert "No faults" in result.stdout
