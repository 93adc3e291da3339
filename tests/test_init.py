"""mmtrain init: a config that works at once, chosen from the data, the model and the device."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import load_config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.init.command import config_text, init
from mmtrain.init.options import InitOptions
from mmtrain.init.survey import Survey, survey
from mmtrain.records.record_set import RecordSet
from mmtrain.train.run import train
from support.builders import TINY, mixed_rows, write_jsonl
from support.pair_data import write_pairs
from support.tower_models import LENGTH, TOWERS

SMALL = Survey(num_samples=100, longest=300, is_complete=True, faults=(), max_positions=4096, num_parameters=8 * 10**9)
GPU = replace(SMALL, gpu_memory=80 * 10**9, has_bfloat16=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data" / "mixed.jsonl", mixed_rows(tmp_path / "data", with_images=True))


@pytest.mark.slow("a run")
def test_the_config_trains_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(TINY), "--data", "data/mixed.jsonl", "--eval", "data/mixed.jsonl", "-o", "my.yaml"]
    result = CliRunner().invoke(app, ["init", *words])
    assert result.exit_code == 0, result.exception
    assert "next: mmtrain inspect-labels my.yaml --all" in result.stderr
    config = load_config(Path("my.yaml"))
    encoder, records = Encoder(load_processor(str(TINY))), RecordSet(config.data.train)
    longest = max(encoder.encode(records.conversation(i), records.roots(i)).num_tokens for i in range(len(records)))
    assert longest <= config.data.max_length < longest + 256
    assert (config.run.output_dir, len(config.data.eval), config.model.dtype) == ("runs/my", 1, "float32")
    train(config)
    assert Path("runs/my/adapter/adapter_model.safetensors").is_file()


def test_what_is_not_given_is_asked(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "asked.yaml"
    result = CliRunner().invoke(app, ["init", "-o", str(output)], input=f"{TINY}\n{data}\n")
    assert result.exit_code == 0, result.exception
    assert load_config(output).model.path == str(TINY)
    assert [source.share for source in load_config(output).data.eval] == [0.1]
    assert "held out and not trained on" in output.read_text()


@pytest.mark.parametrize("words", [["--prompt", 'Say: "what"?'], []])
def test_captions_are_given_a_prompt(words: list[str], data: Path, tmp_path: Path) -> None:
    captions = write_jsonl(data.parent / "captions.jsonl", [{"image": "red.png", "caption": "red"}])
    PIL.Image.new("RGB", (56, 56), "red").save(data.parent / "red.png")
    output = tmp_path / "captions.yaml"
    asked = ["init", "--model", str(TINY), "--data", str(captions), "--eval", str(captions), "-o", str(output), *words]
    result = CliRunner().invoke(app, asked, input='Say: "what"?\n')
    assert result.exit_code == 0, result.exception
    assert ("What the user asks" in result.stdout) == (not words)
    data_section = load_config(output).data
    assert [source.prompt for source in (*data_section.train, *data_section.eval)] == ['Say: "what"?'] * 2


def test_a_model_without_a_chat_template_is_given_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "no-template"
    shutil.copytree(TINY, model)
    template = Path("own.jinja")
    (model / "chat_template.jinja").rename(template)
    words = ["init", "--model", str(model), "--data", str(data)]
    refused = CliRunner().invoke(app, [*words, "-o", "refused.yaml"])
    assert isinstance(refused.exception, UserError)
    assert "--chat-template FILE" in str(refused.exception)
    assert "\n" not in str(refused.exception)
    assert not Path("refused.yaml").exists()
    result = CliRunner().invoke(app, [*words, "-o", "my.yaml", "--chat-template", str(template)])
    assert result.exit_code == 0, result.exception
    assert load_config(Path("my.yaml")).model.chat_template == "own.jinja"


@pytest.mark.parametrize(("name", "loss"), [("clip", "infonce"), ("siglip", "sigmoid")])
def test_a_dual_encoder_gets_a_config_of_pairs(name: str, loss: str, tmp_path: Path) -> None:
    model, pairs, output = TOWERS[name](tmp_path / name), write_pairs(tmp_path / "data"), tmp_path / "my.yaml"
    rows = pairs.read_text().splitlines()
    pairs.write_text(
        "\n".join([rows[0], json.dumps({"image": "1.png", "text": " ".join(["red"] * 60)}), *rows[2:], ""])
    )
    words = ["init", "--model", str(model), "--data", str(pairs), "-o", str(output)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception
    assert "warning: " in result.stderr
    assert f"pairs.jsonl:2: 62 tokens, over the {LENGTH} of the text tower" in result.stderr
    config = load_config(output)
    assert (config.objective.kind, config.objective.loss, config.train.batch_size) == ("contrastive", loss, 2)
    refused = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "other.yaml"), "--chat-template", "own.jinja"])
    assert "--chat-template: a dual encoder has no chats" in str(refused.exception)
    pairs.write_text("\n".join([*rows, ""]))
    train(
        load_config(
            output, [f"run.output_dir={tmp_path / 'run'}", "train.epochs=null", "train.steps=1", "train.warmup_steps=0"]
        )
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_existing_file_and_unusable_data_are_refused(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.yaml"
    output.write_text("mine")
    with pytest.raises(UserError, match="it exists: give a new file"):
        init(InitOptions(str(TINY), str(data), None, output))
    assert output.read_text() == "mine"
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}, {"messages": []}])
    with pytest.raises(UserError, match=r"none of the samples that were tried can be used\n.*bad\.jsonl:1: "):
        init(InitOptions(str(TINY), str(bad), None, tmp_path / "other.yaml"))
    assert not (tmp_path / "other.yaml").exists()


def test_samples_with_faults_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*mixed_rows(tmp_path, with_images=True), {"messages": []}]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    init(InitOptions(str(TINY), str(data), None, tmp_path / "c.yaml"))
    assert "some.jsonl:9: " in capsys.readouterr().err


def test_the_survey_counts_what_the_tiny_model_and_the_data_have(data: Path) -> None:
    found = survey(InitOptions(str(TINY), str(data), None, Path("c.yaml")))
    assert (found.num_samples, found.is_complete, found.max_positions) == (8, True, 2048)
    assert found.num_parameters == 483_968 + 197_216 + 903_296  # as docs/models.md has them


@pytest.mark.parametrize(
    ("found", "key", "expected"),
    [
        (SMALL, "model.dtype", "float32"),
        (GPU, "model.dtype", "bfloat16"),
        (replace(GPU, has_bfloat16=False), "model.dtype", "float32"),
        (GPU, "model.quantization", None),
        (replace(GPU, gpu_memory=24 * 10**9), "model.quantization", "nf4"),  # 16 GB of weights
        (replace(GPU, gpu_memory=40 * 10**9), "run.activation_checkpointing", "auto"),
        (SMALL, "data.max_length", 512),
        (replace(SMALL, is_complete=False, longest=1000), "data.max_length", 1280),
        (replace(SMALL, longest=4000), "data.max_length", 4096),
        (replace(SMALL, longest=4000), "run.microbatch_tokens", 4096),
        (GPU, "run.microbatch_tokens", 8192),
        (SMALL, "train.batch_size", 4),
        (replace(SMALL, num_samples=3), "train.batch_size", 1),
        (replace(SMALL, num_samples=10**6), "train.batch_size", 32),
        (SMALL, "train.epochs", 3),
        (replace(SMALL, num_samples=10**6), "train.epochs", 1),
        (SMALL, "run.eval_every", 15),  # 75 steps
    ],
)
def test_what_is_chosen(found: Survey, key: str, expected: object) -> None:
    text = config_text(found, InitOptions("owner/model", "my data/a.jsonl", None, Path("x/my.yaml")))
    section, name = key.split(".")
    data = yaml.safe_load(text)
    assert data[section].get(name) == expected
    assert data["data"]["train"] == "my data/a.jsonl"
    assert data["run"]["output_dir"] == "runs/my"
