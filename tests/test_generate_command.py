"""`mmtrain generate`: what it runs, one question, a chat, and a file of answers that is continued."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmtrain import api
from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.data_section import Source
from mmtrain.config.schema import Config
from mmtrain.config.tune_section import ComponentModules
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.generate import answer_all as module
from mmtrain.generate.answers_file import AnswersFile
from mmtrain.generate.command import GenerateOptions, generate
from mmtrain.generate.prompts import prompt_for
from mmtrain.generate.questions import Questions
from mmtrain.generate.sampling import Sampling
from mmtrain.generate.target import find_target, load_target
from mmtrain.model.named_model import NamedModel
from mmtrain.model.packing_trial import RowsFound
from mmtrain.records.chat import Conversation, Image, Message, Text
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train
from support.builders import SHAPES, write_jsonl
from support.forked import Server

MakeConfig = Callable[..., Config]
SHORT = Sampling(max_new_tokens=4)
IMAGE = sorted((SHAPES / "images").iterdir())[0]


def options(path: Path, **settings: Any) -> GenerateOptions:
    return GenerateOptions(str(path), dtype="float32", sampling=SHORT, **settings)


def answers(path: Path, data: Path, output: Path, **settings: Any) -> list[dict[str, Any]]:
    generate(options(path, data=(str(data),), output=output, **settings))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(make_config: MakeConfig, kind: str) -> Path:
    return Path(make_config(kind).data.train[0].path)


def test_every_question_of_a_file_is_answered_once(kind: str, model_dirs: dict[str, Path], data: Path) -> None:
    rows = answers(model_dirs[kind], data, data.parent / "answers.jsonl", batch_size=3)
    assert [row["question_index"] for row in rows] == list(range(11))
    assert [row["place"].rpartition(":")[2] for row in rows] == ["1", "2", "3", "3", "4", "5", "6", "7", "7", "7", "8"]
    assert [row["turn"] for row in rows] == [1, 1, 1, 3, 1, 1, 1, 1, 3, 5, 1]
    assert (rows[3]["question"], rows[3]["reference"]) == ("And what shape?", "It is a long, thin rectangle.")
    assert len({row["answer"] for row in rows}) > 4


@pytest.mark.slow("several runs")
def test_a_question_is_answered_as_in_the_file(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(IMAGE, tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<image>What shape?"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "What shape?"}]},
    ]
    path = model_dirs["qwen2_5_vl"]
    found = answers(path, write_jsonl(tmp_path / "asked.jsonl", rows), tmp_path / "answers.jsonl")
    assert [row["reference"] for row in found] == [None, None]
    words = [str(path), "What shape?", "--dtype", "float32", "--max-new-tokens", "4"]
    printed = [CliRunner().invoke(app, ["generate", *words, *more]).stdout for more in (["--image", str(IMAGE)], [])]
    assert printed == [f"{row['answer']}\n" for row in found]
    assert found[0]["answer"] != found[1]["answer"]


@pytest.mark.slow("several files of answers")
@pytest.mark.parametrize("num_kept", [0, 1, 5])
@pytest.mark.parametrize("broken", ["", '{"question_ind'])
def test_a_file_of_answers_is_continued(
    num_kept: int, broken: str, model_dirs: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    data, output = Path(make_config("llava").data.train[0].path), tmp_path / "answers.jsonl"
    whole = answers(model_dirs["llava"], data, output, batch_size=4)
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    output.write_text("".join(lines[:num_kept]) + broken, encoding="utf-8")
    assert answers(model_dirs["llava"], data, output, batch_size=4) == whole


def test_nothing_is_computed_for_answers_that_are_there(
    model_dirs: dict[str, Path], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = Path(make_config("llava").data.train[0].path), tmp_path / "answers.jsonl"
    answers(model_dirs["llava"], data, output, batch_size=4)
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    output.write_text("".join(lines[:5]), encoding="utf-8")
    computed = []
    real = module._replies

    def counted(*args: Any) -> Any:
        computed.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(module, "_replies", counted)
    answers(model_dirs["llava"], data, output, batch_size=4)
    assert computed == [[4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.slow("runs of two processes")
def test_two_processes_write_the_same_file_and_continue_it(
    model_dirs: dict[str, Path], make_config: MakeConfig, tmp_path: Path, server: Server
) -> None:
    """Three batches: one process has none in the second round. The file is continued by processes that are launched."""
    data, one, two = Path(make_config("llava").data.train[0].path), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    whole = answers(model_dirs["llava"], data, one, batch_size=4)
    words = ["generate", str(model_dirs["llava"]), "--data", str(data), "-o", str(two), "--dtype", "float32"]
    words += ["--batch-size", "4", "--max-new-tokens", "4"]
    assert server.run(tmp_path / "logs", words, 2).text.count(": 11 answers") == 1
    assert [json.loads(line) for line in two.read_text(encoding="utf-8").splitlines()] == whole
    two.write_text("".join(one.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    assert server.run(tmp_path / "logs", [*words, "--processes", "2"]).text.count(": 11 answers") == 1
    assert [json.loads(line) for line in two.read_text(encoding="utf-8").splitlines()] == whole


@pytest.mark.slow("several files of answers")
@pytest.mark.parametrize("change", ["sampling", "data", "model", "labels"])
def test_answers_that_were_made_otherwise_are_not_continued(
    change: str, model_dirs: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    data, output = Path(make_config("llava").data.train[0].path), tmp_path / "answers.jsonl"
    path = shutil.copytree(model_dirs["llava"], tmp_path / "model")
    answers(path, data, output)
    sampling = Sampling(max_new_tokens=5) if change == "sampling" else SHORT
    if change == "data":
        data.write_text(data.read_text() + data.read_text().splitlines()[1] + "\n")
    if change == "model":
        (path / "tokenizer_config.json").write_text((path / "tokenizer_config.json").read_text() + " ")
    if change == "labels":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.yaml").write_text(config_of(path, data, train_on="last"))
    with pytest.raises(UserError, match=r"answers.jsonl:1: made with another model, data or options: delete the file"):
        generate(GenerateOptions(str(path), data=(str(data),), output=output, dtype="float32", sampling=sampling))


def config_of(model: Path, data: Path, **labels: Any) -> str:
    sections = {"model": {"path": str(model), "dtype": "float32"}, "data": {"train": [{"path": str(data)}]}}
    return dump_config(Config.model_validate({**sections, "labels": labels, "run": {"output_dir": "run"}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON\n", ":1: not a row of answers"),
        ("[]\n", ":1: not a row of answers"),
        ('{"question_index": 0, "made_with": "other"}\n', ":1: made with another model"),
        ('{"question_index": 0, "made_with": "x"}\n' * 2, ":2: question 0 is there twice"),
    ],
)
def test_a_file_that_is_no_file_of_these_answers_is_left_alone(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        AnswersFile(tmp_path / "a.jsonl", "x")
    assert (tmp_path / "a.jsonl").read_text() == content


def test_every_faulty_record_is_named(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "1?"}]},
        {"messages": [{"role": "user", "content": "<image>2?"}], "images": ["gone.png"]},
        {"messages": [{"role": "assistant", "content": "3"}]},
    ]
    source = Source(path=str(write_jsonl(tmp_path / "asked.jsonl", rows)))
    with pytest.raises(UserError) as caught:
        Questions([source], Encoder(load_processor(str(model_dirs["llava"]))))
    assert [fault.split(": ")[0].rpartition(":")[2] for fault in caught.value.faults] == ["2", "3"]


def test_a_run_is_found_with_its_adapter_labels_and_dtype(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("text", steps=2, checkpoint_every=1)
    config = Config.model_validate(config.model_dump() | {"labels": {"train_on": "last"}})
    train(config)
    run = Path(config.run.output_dir)
    target = find_target(str(run))
    assert (target.path, target.adapter) == (config.model.path, run / "adapter")
    assert (target.labels.train_on, target.dtype) == ("last", "float32")
    other = find_target(str(run / "adapter"), base="other")
    assert (other.path, other.labels.train_on) == ("other", "last")
    assert find_target(str(run), dtype="bfloat16").dtype == "bfloat16"
    shutil.rmtree(run / "checkpoints")
    assert find_target(str(run)).labels.train_on == "last"
    with pytest.raises(UserError, match=r"--base: .* has no adapter_config.json"):
        find_target(config.model.path, base="other")


def test_the_base_of_a_run_is_quantized_as_it_was_in_training(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_config("text").model_dump()
    tune = {"language": {"mode": "lora"}, "components": {"projector": ["model.norm"]}}
    config = Config.model_validate(given | {"model": given["model"] | {"quantization": "nf4"}, "tune": tune})
    for name in ("checkpoints", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    target = find_target(str(tmp_path))
    assert (target.path, target.quantization) == ("base", "nf4")
    asked: list[Any] = []

    def loaded(*args: Any) -> Any:
        asked.extend(args[-2:])
        raise UserError("asked for")

    monkeypatch.setattr("mmtrain.scoring.load.load_model", loaded)
    with pytest.raises(UserError, match="asked for"):
        load_target(replace(target, path=config.model.path, adapter=None), Runtime("float32"))
    assert asked == ["nf4", ComponentModules(projector=("model.norm",))]


@pytest.mark.parametrize("alone", [True, False])
def test_whether_questions_go_together_is_tried_at_the_first_batch(
    alone: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def trial(model: Any, processor: Any, dtype: torch.dtype, packing: bool) -> RowsFound:
        asked.append(packing)
        return RowsFound("it mixes them", alone)

    monkeypatch.setattr("mmtrain.generate.target.try_rows", trial)
    config = make_config("qwen2_5_vl")
    loaded = load_target(NamedModel(config.model.path, dtype="float32"), Runtime("float32"))
    rows: list[int] = []
    loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    image = Image("shape", IMAGE.read_bytes())
    prompt = prompt_for(loaded.encoder, Conversation((Message("user", (image, Text("a?"))),)), Path())
    loaded.generator.replies([prompt], Sampling(max_new_tokens=2))
    assert asked == []
    for _ in range(2):
        loaded.generator.replies([prompt, prompt], Sampling(max_new_tokens=2))
    assert asked == [False]
    assert max(rows) == (1 if alone else 2)
    assert capsys.readouterr().err.count("one question at a time: it mixes them") == alone


@pytest.mark.slow("a run")
def test_the_adapter_changes_the_answers(make_config: MakeConfig) -> None:
    config = make_config("text", steps=30, learning_rate=3e-2)
    train(config)
    paths = (config.run.output_dir, config.model.path)
    (trained,), (base,) = (api.generate(path, ["Say a word."], dtype="float32", max_new_tokens=4) for path in paths)
    assert trained == "word"
    assert base != "word"


def test_a_run_that_has_not_saved_its_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not saved its model yet: finish it"):
        find_target(str(tmp_path))


def test_the_model_of_a_full_run_is_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    target = find_target(str(tmp_path))
    assert (target.path, target.adapter) == (str(tmp_path / "model"), None)


def test_a_chat_remembers_its_turns(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["One?", "Two?", "/new", "Two?", f"/image {IMAGE}", "Two?", "/image gone.png", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    generate(options(model_dirs["qwen2_5_vl"], interactive=True))
    printed = capsys.readouterr()
    first, second, alone, seen = printed.out.splitlines()
    assert len({second, alone, seen}) == 3
    assert "image gone.png: cannot be read: No such file" in printed.err
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "One?"}]},
        {
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": first},
                {"role": "user", "content": "Two?"},
            ]
        },
    ]
    folder = model_dirs["qwen2_5_vl"].parent
    expected = answers(
        model_dirs["qwen2_5_vl"], write_jsonl(folder / "chat.jsonl", rows), folder / "chat-answers.jsonl"
    )
    assert [first, second] == [row["answer"] for row in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a question, or -i for a chat, or --data FILE"),
        (["what?", "-i"], "expected a question, or -i for a chat, or --data FILE"),
        (["--data", "x.jsonl"], "--data FILE and -o FILE go together"),
        (["what?", "-o", "x.jsonl"], "--data FILE and -o FILE go together"),
        (["--data", "x.jsonl", "-o", "y", "--system", "Hi."], "--image and --system are for a question"),
        (["what?", "--top-p", "0.5"], "--top-p 0.5: it has no effect without --do-sample"),
        (["what?", "--image", "gone.png"], "image gone.png: cannot be read"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(tmp_path), *words])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_the_options_of_the_command_line_reach_transformers() -> None:
    given = Sampling(7, True, 0.5, 0.9, 3, 2, 1.5, 4)
    config = given.config({5, 3}, 0)
    assert (config.max_new_tokens, config.do_sample, config.temperature) == (7, True, 0.5)
    assert (config.top_p, config.top_k, config.num_beams, config.repetition_penalty) == (0.9, 3, 2, 1.5)
    assert (config.eos_token_id, config.pad_token_id) == ([3, 5], 0)
