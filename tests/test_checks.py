"""Every fault of labels is planted in a real sample and found; what is right gives none.

The texts that labels must decode to, and the kinds of faults, are written by hand.
"""

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmtrain.checks import earlier_prompts, findings, inference
from mmtrain.checks import labels as label_checks
from mmtrain.checks.content import image_notes
from mmtrain.checks.findings import IGNORED, Finding
from mmtrain.checks.labels import Checker
from mmtrain.config.data_section import TrainSource
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.segments import Known
from mmtrain.records.chat import Conversation, Image, Message, Part, Role, Text
from mmtrain.records.record_set import RecordSet
from support.builders import ROOT, SHAPES, TINY, mixed_rows, write_jsonl
from support.fresh_samples import FreshSamples
from support.label_models import OTHER_TEMPLATES, TEMPLATES, TOKENIZERS, make_directory

KINDS = ("qwen2_5_vl", "llava", "text")
Turn = tuple[Role, str | list[str | Image]]
_loaded = cache(lambda path: load_processor(str(path)))


def talk(*turns: Turn, train: tuple[bool, ...] = ()) -> Conversation:
    trained = iter(train)
    messages = []
    for role, content in turns:
        parts: list[str | Image] = [content] if isinstance(content, str) else content
        made: tuple[Part, ...] = tuple(part if isinstance(part, Image) else Text(part) for part in parts)
        messages.append(Message(role, made, next(trained, True) if role == "assistant" else True))
    return Conversation(tuple(messages))


class Sample:
    """An encoded sample that can be tampered with, and what the checks say of it."""

    def __init__(
        self,
        processor: ChatProcessor,
        conversation: Conversation,
        root: Path = Path(),
        train_on: str = "assistant",
        end_of_turn: bool = True,
    ) -> None:
        encoded = Encoder(processor, train_on, end_of_turn).encode(conversation, root)
        self.processor, self.conversation = processor, conversation
        self.checker = Checker(processor, train_on, end_of_turn)
        self.ids = [int(token) for token in encoded.ids]
        self.labels = [token if on else IGNORED for token, on in zip(self.ids, encoded.supervised, strict=True)]
        self.sizes = [span.image.size for span in encoded.images]

    def check(self) -> list[Finding]:
        return self.checker.check(np.array(self.ids), np.array(self.labels), self.conversation, self.sizes)

    @property
    def faults(self) -> set[str]:
        return {finding.kind for finding in self.check() if finding.is_fault}

    @property
    def notes(self) -> list[str]:
        return [finding.kind for finding in self.check() if not finding.is_fault]

    def supervised(self) -> list[int]:
        return [i for i, label in enumerate(self.labels) if label != IGNORED]

    def runs(self) -> list[list[int]]:
        found: list[list[int]] = []
        for i in self.supervised():
            if found and found[-1][-1] == i - 1:
                found[-1].append(i)
            else:
                found.append([i])
        return found

    def supervise(self, positions: list[int] | range) -> None:
        for i in positions:
            self.labels[i] = self.ids[i]

    def ignore(self, positions: list[int] | range) -> None:
        for i in positions:
            self.labels[i] = IGNORED

    def replace(self, start: int, end: int, text: str) -> None:
        """ids[start:end] become `text`, trained on if ids[start] was."""
        new = self.processor.tokenizer.wrapped(text, add_special_tokens=False)["input_ids"]
        self.labels[start:end] = new if self.labels[start] != IGNORED else [IGNORED] * len(new)
        self.ids[start:end] = new


@pytest.fixture
def sample(kind: str, model_dirs: dict[str, Path], tmp_path: Path) -> Sample:
    """Two questions and answers, the first with two images where the model takes them."""
    for name, size in (("a.png", (84, 56)), ("b.png", (56, 112))):
        PIL.Image.new("RGB", size, "red").save(tmp_path / name)
    attached: list[str | Image] = [] if kind == "text" else [Image("a.png"), Image("b.png")]
    asked: list[str | Image] = [*attached, "What is it, please?"]
    conversation = talk(
        ("user", asked), ("assistant", "a large red circle"), ("user", "And this?"), ("assistant", "a small square")
    )
    return Sample(_loaded(model_dirs[kind]), conversation, tmp_path)


def test_an_untampered_sample_has_no_faults(sample: Sample) -> None:
    assert len(sample.runs()) == 2
    assert sample.faults == set()


def no_labels(sample: Sample) -> None:
    sample.ignore(sample.supervised())


def drop_an_end(sample: Sample) -> None:
    sample.ignore(sample.runs()[0][-1:])


def drop_the_last_end(sample: Sample) -> None:
    sample.ignore(sample.runs()[1][-1:])


def drop_a_turn(sample: Sample) -> None:
    sample.ignore(sample.runs()[0])


def drop_the_words(sample: Sample) -> None:
    sample.ignore(sample.runs()[1][:-1])


def drop_the_first_word(sample: Sample) -> None:
    sample.ignore(sample.runs()[1][:2])


def drop_a_word_within(sample: Sample) -> None:
    sample.ignore(sample.runs()[0][2:3])


def supervise_a_question(sample: Sample) -> None:
    start = sample.runs()[1][0]
    sample.supervise(range(start - 6, start - 4))


def supervise_a_header(sample: Sample) -> None:
    sample.supervise([sample.runs()[0][0] - 1])


def supervise_everything(sample: Sample) -> None:
    image = sample.processor.image_token_id
    sample.supervise([i for i, token in enumerate(sample.ids) if token != image])


def shift_labels(sample: Sample) -> None:
    sample.labels = [*sample.labels[1:], IGNORED]


def other_question(sample: Sample) -> None:
    start = sample.runs()[1][0]
    sample.replace(start - 6, start - 5, " never")


def other_tokens(sample: Sample) -> None:
    """The same text of the first question in other tokens than inference's."""
    decode = sample.processor.tokenizer.decode
    position = max(i for i in range(sample.runs()[0][0]) if "please" in decode([sample.ids[i]]))
    new = [sample.processor.tokenizer.wrapped(letter, add_special_tokens=False)["input_ids"] for letter in " please"]
    assert "".join(decode(token) for token in new) == decode([sample.ids[position]])
    sample.ids[position : position + 1] = [token for letter in new for token in letter]
    sample.labels[position : position + 1] = [IGNORED] * len(new)


def lost_header(sample: Sample) -> None:
    start = sample.runs()[1][0]
    del sample.ids[start - 1], sample.labels[start - 1]


def doubled_bos(sample: Sample) -> None:
    sample.ids.insert(0, sample.ids[0])
    sample.labels.insert(0, IGNORED)


def other_answer(sample: Sample) -> None:
    run = sample.runs()[1]
    sample.replace(run[1], run[2], " green")


def end_put_into_the_words(sample: Sample) -> None:
    run = sample.runs()[0]
    sample.ids.insert(run[2], sample.ids[run[-1]])
    sample.labels.insert(run[2], sample.ids[run[2]])


PLANTED: dict[Callable[[Sample], None], set[str]] = {
    no_labels: {findings.NO_LABEL},
    drop_an_end: {findings.NO_END},
    drop_the_last_end: {findings.NO_END},
    drop_a_turn: {findings.NO_TEXT},
    drop_the_words: {findings.NO_TEXT},
    drop_the_first_word: {findings.REPLY, findings.PROMPT},
    drop_a_word_within: {findings.REPLY},
    supervise_a_question: {findings.OUTSIDE},
    supervise_a_header: {findings.PROMPT, findings.REPLY},
    other_question: {findings.PROMPT},
    other_tokens: {findings.PROMPT},
    lost_header: {findings.PROMPT},
    doubled_bos: {findings.PROMPT},
    other_answer: {findings.REPLY},
    end_put_into_the_words: {findings.REPLY},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_faults(sample: Sample, kind: str, plant: Callable[[Sample], None]) -> None:
    plant(sample)
    assert PLANTED[plant] <= sample.faults
    # an end token that the template lacks has no business in a text where it is not trained on
    also = {findings.PROMPT} if kind == "llava" and plant in (drop_an_end, drop_a_turn) else set()
    if plant in (no_labels, drop_an_end, drop_the_last_end, drop_a_turn, supervise_a_question, drop_a_word_within):
        assert sample.faults == PLANTED[plant] | also  # and it is called by no other name


@pytest.mark.parametrize("plant", [shift_labels, supervise_everything], ids=lambda plant: plant.__name__)
def test_labels_of_every_token_or_of_the_next_one(sample: Sample, plant: Callable[[Sample], None]) -> None:
    plant(sample)
    assert (findings.NOT_ITSELF in sample.faults) == (plant is shift_labels)
    assert sample.faults & {findings.PROMPT, findings.OUTSIDE}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"], indirect=True)
def test_planted_faults_of_images(sample: Sample) -> None:
    image = sample.processor.image_token_id
    places = [i for i, token in enumerate(sample.ids) if token == image]
    sample.supervise(places[:1])
    assert sample.faults == {findings.PLACEHOLDER}
    sample.ignore(places[:1])
    del sample.ids[places[-1]], sample.labels[places[-1]]
    assert findings.NO_PLACEHOLDERS in sample.faults
    assert findings.PLACEHOLDER not in sample.faults
    sample.supervise(places[-2:-1])  # of the image that is not whole any more
    assert {findings.NO_PLACEHOLDERS, findings.PLACEHOLDER} <= sample.faults


def test_reasons_name_the_turn_and_the_text(sample: Sample) -> None:
    other_answer(sample)
    (fault,) = [finding for finding in sample.check() if finding.kind == findings.REPLY]
    assert fault.reason.startswith("turn 4: the labels say ")
    assert "green" in fault.reason
    assert "a small square" in fault.reason


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_turns_that_are_not_to_be_trained_on(sample: Sample, kind: str) -> None:
    """Labels made for every turn, checked against a record or a config that says otherwise."""
    sample.checker = Checker(sample.processor, "last", True)
    reasons = {finding.kind: finding.reason for finding in sample.check() if finding.is_fault}
    # the end token put after a turn that is not trained on is not in inference's text
    assert reasons.keys() == {findings.OUTSIDE} | ({findings.PROMPT} if kind == "llava" else set())
    assert reasons[findings.OUTSIDE].startswith("turn 2 (assistant)")
    sample.checker = Checker(sample.processor, "assistant", True)
    first, *rest = sample.conversation.messages
    sample.conversation = Conversation((first, rest[0], rest[1], Message("assistant", rest[2].parts, train=False)))
    (fault,) = [finding for finding in sample.check() if finding.is_fault]
    assert (fault.kind, fault.reason[:18]) == (findings.OUTSIDE, "turn 4 (assistant)")
    sample.ignore(sample.runs()[1])
    assert sample.faults == set()


def test_ends_are_trained_on_where_the_config_says_so(sample: Sample) -> None:
    sample.checker = Checker(sample.processor, end_of_turn=False)
    assert sample.faults == {findings.OUTSIDE}


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("end_of_turn", [True, False])
def test_mixed_rows_have_no_faults(
    kind: str, train_on: str, end_of_turn: bool, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "mixed.jsonl", mixed_rows(tmp_path, with_images=kind != "text"))
    assert found_in(str(path), _loaded(model_dirs[kind]), train_on, end_of_turn, 8) == []


@pytest.mark.parametrize("file", ["train.json", "test.json", "train_multiturn.jsonl", "train_two_images.jsonl"])
def test_shapes_have_no_faults(file: str) -> None:
    assert found_in(str(SHAPES / file), _loaded(TINY), "assistant", True, 100) == []


@pytest.mark.parametrize("file", ["train.jsonl", "eval.jsonl"])
def test_the_quickstart_has_no_faults(file: str) -> None:
    assert found_in(str(ROOT / "data_samples" / "quickstart" / file), _loaded(TINY), "assistant", True, 96) == []


def found_in(path: str, processor: ChatProcessor, train_on: str, end_of_turn: bool, num: int) -> list[Finding]:
    samples = FreshSamples(RecordSet([TrainSource(path=path)]), Encoder(processor, train_on, end_of_turn))
    checker, found = Checker(processor, train_on, end_of_turn), []
    for index in range(min(num, len(samples))):
        encoded = samples.encoded(index)
        labels = np.where(encoded.supervised, encoded.ids, IGNORED)
        sizes = [span.image.size for span in encoded.images]
        found += checker.check(encoded.ids, labels, samples.records.conversation(index), sizes)
    assert len(samples) >= min(num, 8)
    return [finding for finding in found if finding.is_fault]


TALKS = {
    "plain": talk(("user", "what?"), ("assistant", "a circle"), ("user", "and this?"), ("assistant", "blue.")),
    "chinese": talk(("user", "这是什么？"), ("assistant", "红圆。👩🏽‍🚀"), ("user", "e?"), ("assistant", "e\u0301")),
    "newlines": talk(("user", " \n what?\n"), ("assistant", "a list:\n\n"), ("user", "so?"), ("assistant", "red  ")),
    "leading": talk(("user", "what?"), ("assistant", "\n\n red"), ("user", "and?"), ("assistant", " blue")),
    "literal": talk(("user", "</s><|im_end|>"), ("assistant", "<|im_end|> </s>"), ("user", "?"), ("assistant", "ok")),
    "parts": talk(("user", "what?"), ("assistant", ["o", "ne "]), ("user", "and?"), ("assistant", ["  ", "two"])),
    "off": talk(("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"), train=(False, True)),
}  # fmt: skip


@pytest.mark.parametrize("template", [*TEMPLATES, *OTHER_TEMPLATES])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_no_false_alarm_for_any_tokenizer_and_template(tokenizer: str, template: str, tmp_path: Path) -> None:
    path = make_directory(tmp_path, tokenizer, {**TEMPLATES, **OTHER_TEMPLATES}[template].text)
    processor, alarms = load_processor(str(path)), {}
    for name, conversation in TALKS.items():
        for end_of_turn in (True, False):
            made = Sample(processor, conversation, end_of_turn=end_of_turn)
            alarms[name, end_of_turn] = [finding.reason for finding in made.check() if finding.is_fault]
    assert not any(alarms.values()), alarms
    assert len(alarms) == 2 * len(TALKS)


@pytest.mark.parametrize("template", ["chatml", "llava", "mistral"])
@pytest.mark.parametrize("tokenizer", ["byte_level", "metaspace_first", "legacy"])
def test_lost_white_space_is_a_fault(tokenizer: str, template: str, tmp_path: Path) -> None:
    path = make_directory(tmp_path, tokenizer, TEMPLATES[template].text)
    made = Sample(load_processor(str(path)), talk(("user", "what?"), ("assistant", "a list:\n\n\n")))
    assert made.faults == set()
    run = made.runs()[0]
    newlines = [i for i in run if made.processor.tokenizer.decode([made.ids[i]]).isspace()]
    position = newlines[-1]
    del made.ids[position], made.labels[position]
    assert findings.REPLY in made.faults


def notes_of(model: Path, conversation: Conversation) -> list[str]:
    made = Sample(_loaded(model), conversation)
    assert made.faults == set()
    return sorted(made.notes)


def test_the_three_exceptions_are_notes(model_dirs: dict[str, Path]) -> None:
    plain = talk(("user", "what?"), ("assistant", "red"))
    assert notes_of(model_dirs["text"], plain) == []
    assert notes_of(model_dirs["text"], talk(("user", "a <|im_end|> b"), ("assistant", "red"))) == [findings.LITERAL]
    assert notes_of(model_dirs["text"], talk(("user", "what?"), ("assistant", "\nred"))) == [findings.WHITE_SPACE]
    assert notes_of(model_dirs["llava"], plain) == [findings.ADDED_END]


@pytest.mark.parametrize(
    ("kind", "size", "notes"),
    [
        ("llava", (28, 28), []),
        ("llava", (56, 56), []),  # four times the pixels used, and no more
        ("llava", (57, 57), [findings.LARGE]),
        ("llava", (32, 28), []),  # 14 % wider than what is used
        ("llava", (33, 28), [findings.CROPPED]),
        ("llava", (28, 33), [findings.CROPPED]),
        ("qwen2_5_vl", (112, 56), []),
    ],
)
def test_notes_on_images(kind: str, size: tuple[int, int], notes: list[str], model_dirs: dict[str, Path]) -> None:
    assert [finding.kind for finding in image_notes([size], _loaded(model_dirs[kind]))] == notes


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_earlier_prompts_are_those_of_inference(
    tokenizer: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bos_in_front = template == "llama3"
    processor = load_processor(
        str(make_directory(tmp_path, tokenizer, TEMPLATES[template].text, bos_in_front=bos_in_front))
    )
    special = next(iter(processor.tokenizer.traits.added.values()))
    asked = ["P", " Q\n", "\n\nR ", "Saß", special]
    talks = [
        talk(*(turn for text in texts for turn in (("user", text), ("assistant", text + "!"))))
        for texts in (asked[:3], asked[1:4], asked[2:])
    ]
    checker, own = Checker(processor), inference.Inference(processor)
    encoded: list[str] = []
    encode = processor.tokenizer.encode_in_segments

    def counted(texts: list[str], adds_special_tokens: bool, known: Known) -> list[list[int]]:
        encoded.extend(texts)
        return encode(texts, adds_special_tokens, known)

    monkeypatch.setattr(processor.tokenizer, "encode_in_segments", counted)
    for one in talks:
        encoded.clear()
        (prompts,) = checker.prompts([one], {})
        num_encoded = len(encoded)
        for turn, ids in prompts.items():
            assert ids == own.ids(own.rendered(one, turn, begun=True))
        if one is talks[1] and (tokenizer, template) == ("byte_level", "chatml"):
            assert (num_encoded, len(prompts)) == (1, 3)


def test_the_checks_do_not_know_the_encoder() -> None:
    trees = [
        ast.parse(Path(str(one.__file__)).read_text(encoding="utf-8"))
        for one in (label_checks, inference, earlier_prompts)
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name for name in names if name.startswith("mmtrain")}
    assert own == {
        "mmtrain.records.chat",
        "mmtrain.records.reasoning",
        "mmtrain.checks.findings",
        "mmtrain.checks.content",
        "mmtrain.checks.earlier_prompts",
        "mmtrain.checks.folding",
        "mmtrain.checks.inference",
        "mmtrain.encoding.messages",
        "mmtrain.encoding.processor",
        "mmtrain.encoding.segments",
        "mmtrain.checks.reply_frame",
        "mmtrain.safe_text",
    }
