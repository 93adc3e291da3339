"""A config file and its overrides become a Config, or every fault at once with its place."""

import ast
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import mmtrain
from mmtrain.config import Config, dump_config, load_config
from mmtrain.config.keys import AFFECTS_BITS, CHANGEABLE
from mmtrain.config.other_tools import INSTEAD
from mmtrain.config.run_section import Run
from mmtrain.config.schema import Train, json_schema
from mmtrain.config.yaml_file import MAX_BYTES, MAX_DEPTH, dump_yaml, parse_yaml
from mmtrain.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

TEXT = """\
model:
  path: {root}/model
  dtype: float32
tune:
  projector: {{mode: full, learning_rate: 2e-4}}
  language:
    mode: lora
    rank: 16
    targets: [q_proj, v_proj]
data:
  train:
    - path: {root}/train.jsonl
      weight: 1.5
    - path: {root}/more.jsonl
  eval:
    - {{path: {root}/train.jsonl, name: seen}}
  max_length: 1024
labels:
  end_of_turn: true
train:
  steps: 100
  warmup_steps: 10
  learning_rate: 1e-3
run:
  output_dir: runs/try
  hang_timeout: 60
"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A config without a fault; the files it names are there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "more.jsonl").write_text("{}\n")
    return TEXT.format(root=tmp_path)


def load(folder: Path, text: str | bytes, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_config(path, overrides)


def faults(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The faults, with the folder left out of the file's name."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return [fault.replace(f"{folder}/c.yaml", "c.yaml") for fault in caught.value.faults]


def test_a_config_without_faults_is_read_whole(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert config.model.path == f"{tmp_path}/model"
    assert config.model.dtype == "float32"
    assert config.tune.vision.mode == "frozen"
    assert config.tune.projector.model_dump() == {"mode": "full", "learning_rate": 0.0002}
    assert config.tune.language.model_dump() == {
        "mode": "lora",
        "learning_rate": None,
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ("q_proj", "v_proj"),
        "variant": "lora",
    }
    assert [source.weight for source in config.data.train] == [1.5, 1.0]
    assert [source.name for source in config.data.eval] == ["seen"]
    assert (config.data.max_length, config.data.too_long) == (1024, "error")
    assert (config.train.steps, config.train.warmup_steps, config.train.learning_rate) == (100, 10, 0.001)


def test_three_keys_are_enough_and_the_language_model_then_gets_lora(tmp_path: Path, text: str) -> None:
    config = load(
        tmp_path,
        f"model: {{path: {tmp_path}/model}}\ndata: {{train: [{{path: {tmp_path}/train.jsonl}}]}}\n"
        "run: {output_dir: out}\n",
    )
    assert {name: part.mode for name, part in config.tune.modes.items()} == {
        "vision": "frozen",
        "projector": "frozen",
        "language": "lora",
    }


def test_a_config_cannot_be_changed_after_it_is_read(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    with pytest.raises(Exception, match="frozen"):
        config.train.seed = 1


# What is written wrong, where, and the words that the message must hold.
ONE_FAULT = [
    ("  dtype: float32", "  dtype: float16", "c.yaml:3: model.dtype: ", ["float32", "bfloat16", "float16"]),
    ("  dtype: float32", "  dtipe: float32", "c.yaml:3: model.dtipe: ", ["unknown key", "'dtype'"]),
    ("model:", "modle:", "c.yaml:1: modle: ", ["unknown key", "'model'"]),
    ("mode: full,", "mode: ful,", "c.yaml:5: tune.projector", ["frozen", "lora", "full", "'ful'"]),
    ("mode: full, learning_rate", "mode: full, learningrate", "c.yaml:5: tune.projector.learningrate: ", ["'learning"]),
    (
        "mode: full, learning_rate: 2e-4",
        "mode: full, rank: 4",
        "c.yaml:5: tune.projector.rank: ",
        ["only for mode: lora", "tune.projector.mode is full"],
    ),
    ("  projector:", "  projecter:", "c.yaml:5: tune.projecter: ", ["unknown key", "'projector'"]),
    ("    rank: 16", "    rnak: 16", "c.yaml:8: tune.language.rnak: ", ["unknown key", "'rank'"]),
    ("    rank: 16", "    rank: 0", "c.yaml:8: tune.language.rank: ", ["greater than 0", "'0'"]),
    ("    rank: 16", "    rank: 1.5", "c.yaml:8: tune.language.rank: ", ["integer", "'1.5'"]),
    ("    rank: 16", "    rank: sixteen", "c.yaml:8: tune.language.rank: ", ["integer", "'sixteen'"]),
    ("    rank: 16", "    rank: true", "c.yaml:8: tune.language.rank: ", ["integer", "'True'"]),
    ("    rank: 16", "    rank: ~", "c.yaml:8: tune.language.rank: ", ["an integer, but it is empty"]),
    ("    rank: 16", '    rank: "16"', "c.yaml:8: tune.language.rank: ", ["integer", "'16' in quotes: remove them"]),
    ("    rank: 16", "    rank: 100000000", "c.yaml:8: tune.language.rank: ", ["at most 16,384", "'100000000'"]),
    ("    rank: 16", "    dropout: 1.0", "c.yaml:8: tune.language.dropout: ", ["less than 1"]),
    ("    rank: 16", "    variant: lore", "c.yaml:8: tune.language.variant: ", ["lora", "rslora", "dora"]),
    ("[q_proj, v_proj]", "[]", "c.yaml:9: tune.language.targets: ", ["expected a list of at least 1"]),
    ("[q_proj, v_proj]", "q_proj", "c.yaml:9: tune.language.targets: ", ["'q_proj'"]),
    ("[q_proj, v_proj]", "[q_proj, 5]", "c.yaml:9: tune.language.targets.1: ", ["string", "'5'"]),
    ("      weight: 1.5", "      wieght: 1.5", "c.yaml:13: data.train.0.wieght: ", ["unknown key", "'weight'"]),
    ("      weight: 1.5", "      weight: 0", "c.yaml:13: data.train.0.weight: ", ["greater than 0"]),
    ("      weight: 1.5", "      weight: .nan", "c.yaml:13: data.train.0.weight: ", ["number"]),
    ("      weight: 1.5", "      weight: 1e999", "c.yaml:13: data.train.0.weight: ", ["finite"]),
    ("      weight: 1.5", "      format: sharegpt", "c.yaml:13: data.train.0.format: ", ["openai", "conversations"]),
    ("      weight: 1.5", "      name: a", "c.yaml:13: data.train.0.name: ", ["unknown key"]),
    ("name: seen", "weight: 2", "c.yaml:16: data.eval.0.weight: ", ["unknown key"]),
    ("  max_length: 1024", "  maxlength: 1024", "c.yaml:17: data.maxlength: ", ["unknown key", "'max_length'"]),
    ("  max_length: 1024", "  too_long: cut", "c.yaml:17: data.too_long: ", ["error", "drop", "'cut'"]),
    ("  end_of_turn: true", "  end_of_turn: no", "c.yaml:19: labels.end_of_turn: ", ["boolean", "'no'"]),
    ("  end_of_turn: true", "  end_of_turn: 1", "c.yaml:19: labels.end_of_turn: ", ["boolean", "'1'"]),
    ("  steps: 100", "  steps: 1e2", "c.yaml:21: train.steps: ", ["integer"]),
    ("  steps: 100", "  steps: 100\n  epochs: 2", "c.yaml:20: train: ", ["steps", "epochs", "one"]),
    ("  warmup_steps: 10", "  warmup_steps: 100", "c.yaml:20: train: ", ["warmup_steps", "100"]),
    ("  warmup_steps: 10", "  warmup_steps: -1", "c.yaml:22: train.warmup_steps: ", ["0", "'-1'"]),
    ("  output_dir: runs/try", "  threads: 1", "c.yaml:24: run.output_dir: ", ["required"]),
    ("  output_dir: runs/try", "  output_dir: ''", "c.yaml:25: run.output_dir: ", ["at least 1"]),
    ("  learning_rate: 1e-3", "  learning_rate: fast", "c.yaml:23: train.learning_rate: ", ["number", "'fast'"]),
    ("  hang_timeout: 60", "  threads: 1000000", "c.yaml:26: run.threads: ", ["at most 1,024"]),
    ("  hang_timeout: 60", "  microbatches: 10000000", "c.yaml:26: run.microbatches: ", ["'auto' or", "65,536"]),
    (
        "  hang_timeout: 60",
        "  microbatches: x",
        "c.yaml:26: run.microbatches: ",
        ["'auto' or an integer, not 'x'"],
    ),
    ("  hang_timeout: 60", "  microbatches: {a: 1}", "c.yaml:26: run.microbatches: ", ["'auto' or an integer"]),
    ("  hang_timeout: 60", "  microbatches: [1]", "c.yaml:26: run.microbatches: ", ["'auto' or an integer"]),
    ("  learning_rate: 1e-3", "  batch_size: 1" + "0" * 30, "c.yaml:23: train.batch_size: ", ["at most 1,000,000"]),
    (
        "  output_dir: runs/try",
        "  output_dir: runs/try\n  keep_best: loss",
        "c.yaml:26: run.keep_best: ",
        ["a figure of an evaluation", "'loss'"],
    ),
    ("  output_dir: runs/try", '  output_dir: "a\\0b"', "c.yaml:25: run.output_dir: ", ["without a null character"]),
    ("      weight: 1.5", "      weight: 1e7", "c.yaml:13: data.train.0.weight: ", ["at most 1,000,000,"]),
    ("  eval:", "  ignore_fields: bbox\n  eval:", "c.yaml:15: data.ignore_fields: ", ["expected a list, not 'bbox'"]),
    ("  learning_rate: 1e-3", "  learning_rate: 0", "c.yaml:23: train.learning_rate: ", ["greater than 0"]),
    ("  learning_rate: 1e-3", "  seed: 4294967296", "c.yaml:23: train.seed: ", ["4294967296"]),
    ("  hang_timeout: 60", "  keep_checkpoints: 1", "c.yaml:26: run.keep_checkpoints: ", ["2"]),
    ("  hang_timeout: 60", "  graph_memory_gib: 1.0", "c.yaml:26: run.graph_memory_gib does not work", ["chat"]),
    ("  max_length: 1024", "objective: {scale: 3.0}", "c.yaml:17: objective.scale is for `kind: ", ["objective.kind"]),
    ("  learning_rate: 1e-3", "  steps: 7", "c.yaml:23: ", ["'steps'", "twice"]),
    ("  learning_rate: 1e-3", "  learning_rate: *rate", "c.yaml:23: ", ["alias"]),
    ("  learning_rate: 1e-3", "  learning_rate: !rate 1", "c.yaml:23: ", ["tag", "'!rate'"]),
    ("  learning_rate: 1e-3", "  learning_rate: !!python/name:os.system", "c.yaml:23: ", ["tag"]),
    ("  learning_rate: 1e-3", "  learning_rate: !!float 1", "c.yaml:23: ", ["tag"]),
    ("  learning_rate: 1e-3", "  [a, b]: 1", "c.yaml:23: ", ["key must be a word"]),
    ("  learning_rate: 1e-3", "  learning_rate: {a: 1", "c.yaml:24: ", ["not YAML"]),
    ("  learning_rate: 1e-3", "\tlearning_rate: 1", "c.yaml:23: ", ["not YAML"]),
    ("  learning_rate: 1e-3", "  learning_rate: 1\n---\nb: 1", "c.yaml:24: ", ["not YAML"]),
]


@pytest.mark.parametrize(("right", "wrong", "place", "words"), ONE_FAULT, ids=[case[1].strip() for case in ONE_FAULT])
def test_a_fault_names_its_line_its_key_and_what_was_expected(
    tmp_path: Path, text: str, right: str, wrong: str, place: str, words: list[str]
) -> None:
    assert text.count(right) == 1
    changed = text.replace(right, wrong)
    if wrong == "modle:":  # two faults: the wrong key, and the section that is not there any more
        assert "c.yaml:1: model: required, but missing" in faults(tmp_path, changed)
    (fault,) = [fault for fault in faults(tmp_path, changed) if fault.startswith(place)]
    for word in words:
        assert word in fault
    assert len(faults(tmp_path, changed)) == (2 if wrong == "modle:" else 1)


def test_all_faults_of_a_file_and_of_its_overrides_come_at_once(tmp_path: Path, text: str) -> None:
    text = text.replace("dtype: float32", "dtipe: float32").replace("rank: 16", "rank: -1")
    found = faults(tmp_path, text.replace("max_length", "maks_length"), "train.seed=x", "labels.train_on=all")
    places = ["c.yaml:3: model.dtipe", "c.yaml:8: tune.language.rank", "c.yaml:17: data.maks_length"]
    places += ["command line: labels.train_on", "command line: train.seed"]
    assert sorted(fault.split(": ", 2)[0] + ": " + fault.split(": ", 2)[1] for fault in found) == sorted(places)


def test_one_faulty_item_of_a_list_is_one_fault(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, "data.train=[5]")
    assert fault == "command line: data.train.0: expected a section of keys, such as {path: ...}, not '5'"


def test_an_override_of_an_item_and_of_a_key_in_it(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text, "data.train.0=5", f"data.train.0.path={tmp_path}/more.jsonl")
    assert [source.path for source in config.data.train] == [f"{tmp_path}/more.jsonl"] * 2
    assert config.data.train[0].weight == 1.0


def test_keys_of_lora_where_the_mode_was_overridden_say_what_is_the_matter(tmp_path: Path, text: str) -> None:
    found = faults(tmp_path, text, "tune.language.mode=full")
    assert [fault.split(": ")[1] for fault in found] == ["tune.language.rank", "tune.language.targets"]
    for fault in found:
        assert "only for mode: lora, and tune.language.mode is full" in fault
        assert "tune.language='{mode: full}'" in fault
    assert load(tmp_path, text, "tune.language={mode: full}").tune.language.mode == "full"
    assert "only for mode: lora and full" in faults(tmp_path, text, "tune.projector.mode=frozen")[0].replace(
        "full and lora", "lora and full"
    )


@pytest.mark.parametrize("written", ["{root}/train.jsonl", "[{root}/train.jsonl]", "[{{path: {root}/train.jsonl}}]"])
def test_a_source_can_be_a_plain_path(tmp_path: Path, text: str, written: str) -> None:
    value = written.format(root=tmp_path)
    whole = load(tmp_path, text, f"data.train=[{{path: {tmp_path}/train.jsonl}}]")
    assert load(tmp_path, text, f"data.train={value}") == whole
    data, _ = parse_yaml(text, "text")
    data["data"]["train"] = yaml.safe_load(value)
    assert load(tmp_path, dump_yaml(data)) == whole
    assert load(tmp_path, dump_yaml(data), "data.train.0.weight=2").data.train[0].weight == 2.0
    assert load(tmp_path, dump_yaml(data), f"data.eval={tmp_path}/more.jsonl").data.eval[0].name is None
    assert Config.model_validate(data) == whole


def test_faults_of_plain_paths_name_the_source(tmp_path: Path, text: str) -> None:
    found = faults(tmp_path, text, f"data.train=[{tmp_path}/train.jsonl, {tmp_path}/no.jsonl, 5]")
    assert sorted(fault.split(": ", 2)[1] for fault in found) == ["data.train.1.path", "data.train.2"]
    assert faults(tmp_path, text, "data.train=5") == ["command line: data.train: expected a list, not '5'"]
    (fault,) = faults(tmp_path, text, "data.train=[]")
    assert "expected a list of at least 1" in fault


def test_a_missing_relative_path_is_named_in_full(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a\nb").mkdir()
    for folder, expected in ((tmp_path, str(tmp_path)), (tmp_path / "a\nb", f"{tmp_path}/a⏎b")):
        monkeypatch.chdir(folder)
        (fault,) = faults(tmp_path, text, "data.train.0.path=train-2.jsonl")
        assert fault.endswith(f"there is no 'train-2.jsonl' (looked for {expected}/train-2.jsonl)")


@pytest.mark.parametrize("name", ["a/b--c", "a/..", "../a", "a/b.", "-a/b", "a/b/c", "a/" + "b" * 95, "a/b-", "é/b"])
def test_what_the_hub_would_not_take_is_not_a_hub_id(tmp_path: Path, text: str, name: str) -> None:
    (fault,) = faults(tmp_path, text, f"model.path={name}")
    assert "expected a model directory or a hub id" in fault


def test_missing_files_come_with_the_other_faults(tmp_path: Path, text: str) -> None:
    text = text.replace("/more.jsonl", "/nowhere.jsonl").replace("rank: 16", "rank: -1")
    found = faults(tmp_path, text)
    assert any(fault.startswith("c.yaml:8: tune.language.rank: ") for fault in found)
    assert any(fault.startswith("c.yaml:14: data.train.1.path: ") for fault in found)


def test_all_bad_overrides_come_at_once(tmp_path: Path, text: str) -> None:
    found = faults(tmp_path, text, "nothing", "data.train.9.path=x", "train.seed=x")
    for word in ("'nothing'", "'9'", "train.seed"):
        assert any(word in fault and fault.startswith("command line: ") for fault in found), word


@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ("/model", "/nowhere", "c.yaml:2: model.path: "),
        ("/more.jsonl", "/nowhere.jsonl", "c.yaml:14: data.train.1.path: "),
        ("/more.jsonl", "/*.nowhere", "c.yaml:14: data.train.1.path: "),
        ("      weight: 1.5", "      root: nowhere/at/all", "c.yaml:13: data.train.0.root: "),
    ],
)
def test_a_file_that_is_not_there_is_named(tmp_path: Path, text: str, right: str, wrong: str, place: str) -> None:
    (fault,) = faults(tmp_path, text.replace(right, wrong))
    assert fault.startswith(place)
    assert "no " in fault


def test_a_tilde_is_the_home_folder_and_a_variable_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written = text.replace(f"path: {tmp_path}/model", "path: ~/model").replace(f"{tmp_path}/train", "~/train")
    config = load(tmp_path, written, "run.output_dir=~/runs/a~b", "data.train.0.root=[~/model]")
    assert (config.model.path, config.data.train[0].path) == (f"{tmp_path}/model", f"{tmp_path}/train.jsonl")
    assert (config.run.output_dir, config.data.train[0].root) == (
        f"{tmp_path}/runs/a~b",
        (f"{tmp_path}/model",),
    )
    output, missing = faults(tmp_path, text, "data.train.0.path=$HOME/x", "run.output_dir=${HOME}/runs")
    assert missing.startswith("command line: data.train.0.path: there is no '$HOME/x'")
    assert missing.endswith("variables are not replaced in a config")
    assert output.startswith("command line: run.output_dir: '${HOME}/runs' has a variable, which is not replaced")


def test_a_name_too_long_for_a_file_is_one_that_is_not_there(tmp_path: Path, text: str) -> None:
    long = "a" * 300
    for override, place in (("model.path", "model.path"), ("data.train.0.path", "data.train.0.path")):
        (fault,) = faults(tmp_path, text, f"{override}={long}")
        assert fault.startswith(f"command line: {place}: ")


def test_a_null_character_in_a_glob_is_a_fault(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, 'data.train.0.path="a\\0/*"')
    assert fault.startswith("command line: data.train.0.path: ")


def test_a_glob_a_folder_and_a_hub_id_are_taken(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text, f"data.train.0.path={tmp_path}/*.jsonl", f"data.train.1.path={tmp_path}")
    assert config.data.train[0].path.endswith("*.jsonl")
    assert load(tmp_path, text, "model.path=Qwen/Qwen2.5-VL-7B-Instruct").model.path == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_nothing_trainable_is_a_fault(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, "tune={language: {mode: frozen}}")
    assert fault.startswith("command line: tune: nothing is trainable")


def test_two_kinds_of_adapter_are_a_fault(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, "tune.vision={mode: lora, variant: dora}")
    assert fault.startswith(("c.yaml:4: tune: ", "command line: tune"))
    assert "dora" in fault


@pytest.mark.parametrize("part", ["{mode: lora, lora: {x: 1}, rnak: 3}", "{mode: full, full: [1], rnak: 3}"])
def test_keys_named_like_modes_are_unknown_keys(tmp_path: Path, text: str, part: str) -> None:
    found = faults(tmp_path, text + "#", f"tune.vision={part}")
    assert len(found) == 2
    assert any("tune.vision.rnak: unknown key" in fault for fault in found)


# --- keys in the section of others ---


def test_a_key_of_run_under_train_is_refused_with_its_section(tmp_path: Path, text: str) -> None:
    assert faults(tmp_path, text, "train.output_dir=x") == [
        "command line: train.output_dir: unknown key; did you mean run.output_dir?"
    ]
    moved = text.replace("run:\n", "")
    expected = [f"train.{key}: unknown key; did you mean run.{key}?" for key in ("output_dir", "threads")]
    assert all(any(line in fault for fault in faults(tmp_path, moved + "  threads: 1\n")) for line in expected)


def test_a_key_of_train_under_run_is_refused_with_its_section(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, "run.seed=1")
    assert fault == "command line: run.seed: unknown key; did you mean train.seed?"


# --- keys of other tools ---


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("model.rank=8", "model.rank: unknown key; did you mean tune.vision.rank or tune.projector.rank or "),
        ("lora_r=8", "lora_r: unknown key; use tune.language.rank"),
        ("train.num_train_epochs=3", "train.num_train_epochs: unknown key; use train.epochs"),
        (
            "gradient_accumulation_steps=8",
            "gradient_accumulation_steps: unknown key; use train.batch_size, the product",
        ),
        (
            "objective.temperature=0.07",
            "objective.temperature: unknown key; use objective.scale, which is 1 / temperature",
        ),
        ("trust_remote_code=true", "trust_remote_code: unknown key; remove it: code of a model directory is never run"),
    ],
)
def test_a_key_that_has_another_place_or_name_is_refused_with_ours(
    tmp_path: Path, text: str, override: str, expected: str
) -> None:
    (fault,) = faults(tmp_path, text, override)
    assert fault.startswith(f"command line: {expected}")


def test_what_is_said_of_other_tools_names_keys_that_exist_and_none_of_theirs_hides_one_of_ours() -> None:
    paths = _valid_paths(json_schema())
    named = {
        word
        for words in INSTEAD.values()
        for word in re.findall(r"\b(?:model|tune|objective|data|labels|train|run)\.\w+(?:\.\w+)?", words)
    }
    assert len(named) > 20
    assert sorted(named - paths) == []
    assert sorted(set(INSTEAD) & {path.rpartition(".")[2] for path in paths} - {"adapter"}) == []


def test_the_page_about_other_tools_shows_a_config_that_is_read_and_keys_that_are_named() -> None:
    page = (ROOT / "docs" / "other-tools.md").read_text(encoding="utf-8")
    theirs, ours = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S))
    config = Config.model_validate(ours)
    assert set(theirs) - set(INSTEAD) == {"output_dir", "learning_rate"}  # found by their places
    assert config.model.path == theirs["model_name_or_path"]
    assert config.tune.language.model_dump()["rank"] == theirs["lora_rank"]
    accumulated = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    assert (config.train.epochs, config.train.batch_size) == (theirs["num_train_epochs"], accumulated)
    assert (config.data.max_length, config.data.eval[0].share) == (theirs["cutoff_len"], theirs["val_size"])
    assert (config.train.learning_rate, config.train.schedule) == (theirs["learning_rate"], theirs["lr_scheduler_type"])


def _valid_paths(schema: dict[str, Any]) -> set[str]:
    """Every key path of the schema of a config, with those of all kinds of a section."""

    def inside(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, list):
            for item in node:
                yield from inside(item, path)
        elif isinstance(node, dict):
            if "$ref" in node:
                yield from inside(schema["$defs"][node["$ref"].rpartition("/")[2]], path)
            for key, value in node.get("properties", {}).items():
                yield path + key
                yield from inside(value, f"{path}{key}.")
            for key in ("anyOf", "oneOf", "items"):
                yield from inside(node.get(key, []), path)

    return set(inside(schema, ""))


def test_what_may_change_on_resume_is_run_and_a_short_list_and_the_docs_name_it() -> None:
    assert CHANGEABLE == ("data.eval", "data.decode_images", "run")
    words = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert [key for key in CHANGEABLE if f"`{key}`" not in words] == []


def test_the_keys_of_run_that_may_change_bits() -> None:
    no_bit = {"output_dir", "hang_timeout", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_answers"}
    no_bit |= {"keep_best", "trackers", "graph_memory_gib"}
    assert set(Run.model_fields) - set(AFFECTS_BITS) == no_bit


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=50", ["train", "steps"], 50),
        ("train.learning_rate=1e-5", ["train", "learning_rate"], 0.00001),
        ("train.max_grad_norm=null", ["train", "max_grad_norm"], None),
        ("run.output_dir=a=b", ["run", "output_dir"], "a=b"),
        ('run.output_dir="12"', ["run", "output_dir"], "12"),
        ("tune.language.rank=8", ["tune", "language", "rank"], 8),
        ("tune.language.targets=[o_proj]", ["tune", "language", "targets"], ["o_proj"]),
        ("tune.language.targets.1=o_proj", ["tune", "language", "targets"], ["q_proj", "o_proj"]),
        ("tune.vision={mode: full}", ["tune", "vision"], {"mode": "full", "learning_rate": None}),
        ("tune.vision.mode=full", ["tune", "vision", "mode"], "full"),
        ("data.train.1.weight=0.25", ["data", "train", 1, "weight"], 0.25),
        ("data.eval=[]", ["data", "eval"], []),
        ("labels={train_on: last}", ["labels", "train_on"], "last"),
    ],
)
def test_an_override_sets_its_key_and_nothing_else(
    tmp_path: Path, text: str, override: str, key: list[Any], value: Any
) -> None:
    expected = load(tmp_path, text).model_dump(mode="json")
    here: Any = expected
    for step in key[:-1]:
        here = here[step]
    assert here[key[-1]] != value
    here[key[-1]] = value
    if key == ["tune", "vision", "mode"]:
        here["learning_rate"] = None
    assert load(tmp_path, text, override).model_dump(mode="json") == expected


def test_overrides_alone_can_make_a_config_and_the_last_one_wins(tmp_path: Path, text: str) -> None:
    config = load(
        tmp_path,
        "",
        f"model.path={tmp_path}/model",
        f"data.train=[{{path: {tmp_path}/train.jsonl}}]",
        "run.output_dir=a",
        "run.output_dir=b",
        "data.train.0.weight=2",
    )
    assert (config.run.output_dir, config.data.train[0].weight) == ("b", 2.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("train.steps=[1", "not YAML"),
        ("train.steps=*x", "alias"),
        ("train.stpes=5", "'steps'"),
        ("data.train.7.weight=2", "'7'"),
        ("data.train.x.weight=2", "'x'"),
        ("data.train.7=2", "'7'"),
        ("5=1", "5: unknown key"),
        ("train..steps=5", "unknown key"),
        ("data.train." + "1" * 5000 + "=1", "there is no"),
        ("train.steps.x=1", "train.steps"),
    ],
)
def test_a_bad_override_is_reported_as_the_command_line_s(tmp_path: Path, text: str, override: str, words: str) -> None:
    (fault,) = faults(tmp_path, text, override)
    assert fault.startswith("command line: ")
    assert words in fault


def test_a_fault_inside_an_overriding_section_is_not_put_on_a_line_of_the_file(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text, "tune.language={mode: lora, rank: x}")
    assert fault.startswith("command line: tune.language.rank: ")


# --- YAML ---


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-4", 0.0001),
        ("1E5", 100000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-0.25", -0.25),
        ("010", 10),
        ("+7", 7),
        ("-3", -3),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e", "1e"),
        ("=", "="),
        ("|\n  12", "12"),
    ],
)
def test_scalars_are_read_as_yaml_1_2_without_surprises(scalar: str, value: Any) -> None:
    read = parse_yaml(f"a: {scalar}", "x")[0]["a"]
    assert (read, type(read)) == (value, type(value))


def test_every_key_has_the_line_it_stands_on() -> None:
    text = "a:\n  b: 1\n\n  # words\n  c:\n    - x\n    - d: 2\n      e: {f: 3,\n        g: 4}\n"
    assert parse_yaml(text, "x")[1] == {
        (): 1,
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 5,
        ("a", "c", 0): 6,
        ("a", "c", 1): 7,
        ("a", "c", 1, "d"): 7,
        ("a", "c", 1, "e"): 8,
        ("a", "c", 1, "e", "f"): 8,
        ("a", "c", 1, "e", "g"): 9,
    }


def test_every_doubled_key_is_named_with_the_line_of_the_second() -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", "x")
    assert [fault.split(": ")[0] for fault in caught.value.faults] == ["x:4", "x:5"]
    assert all("twice" in fault for fault in caught.value.faults)


def test_a_bomb_of_aliases_is_refused_before_it_costs_anything() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(UserError, match="x:2: an alias"):
        parse_yaml(bomb, "x")


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 5_000, "- " * 5_000, "? " * 5_000])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="nested deeper"):
        parse_yaml(text, "x")


def test_nesting_that_a_config_could_have_is_taken() -> None:
    depth = MAX_DEPTH - 1
    assert parse_yaml("[" * depth + "1" + "]" * depth, "x")[0] is not None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: \xff\xfe\n", "UTF-8"),
        ("model: 1\n".encode("utf-16-le"), "c.yaml"),
        (b"model: 1\x00\n", "not YAML"),
        (b"a: " + b"x" * MAX_BYTES, "larger than"),
        (b"- 1\n- 2\n", "expected sections"),
        (b"just words\n", "expected sections"),
        (b"5\n", "expected sections"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (fault,) = faults(tmp_path, content)
    assert fault.startswith("c.yaml")
    assert words in fault
    assert len(fault) < 200


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only words\n", b"---\n", b"null\n"])
def test_an_empty_config_names_the_command_that_writes_one(tmp_path: Path, content: bytes) -> None:
    assert faults(tmp_path, content) == ["c.yaml: it is empty: expected a config, such as `mmtrain init` writes"]


def test_a_config_of_another_tool_names_the_page_about_them_first(tmp_path: Path) -> None:
    first, *others = faults(tmp_path, b"model_name_or_path: a\ncutoff_len: 2048\n")
    assert first == "c.yaml: not a config of mmtrain: docs/other-tools.md shows one next to that of another tool"
    assert any("cutoff_len: unknown key; use data.max_length" in fault for fault in others)
    assert not any("not a config" in fault for fault in faults(tmp_path, b"model: {path: a}\ncutoff_len: 2048\n"))


def test_an_empty_object_lacks_the_three_required_sections(tmp_path: Path) -> None:
    assert [fault.split(": ", 1)[1] for fault in faults(tmp_path, b"{}\n")] == [
        f"{section}: required, but missing" for section in ("model", "data", "run")
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path, text: str) -> None:
    expected = load(tmp_path, text)
    assert load(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == expected


def test_a_config_that_is_a_pipe_or_a_device_is_a_plain_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    signal.alarm(60)
    for name in ("fifo.yaml", "zero.yaml"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read: not a regular file"):
            load_config(tmp_path / name)
    signal.alarm(0)


@pytest.mark.parametrize("content", [None, b"", b"a: [", b"1", b"\xff", b"a: *b", b"x" * (MAX_BYTES + 1)])
@pytest.mark.parametrize("name", [b"a\nb.yaml", b"\x1b[31m.yaml", b"\xff.yaml"])
def test_a_config_with_a_strange_name_is_reported_in_printable_lines(
    tmp_path: Path, name: bytes, content: bytes | None
) -> None:
    path = tmp_path / os.fsdecode(name)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path, ["train.steps=x"])
    for fault in caught.value.faults:
        assert fault.isprintable()
        fault.encode()


def test_a_config_that_is_missing_or_a_folder_is_a_plain_fault(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path, tmp_path / "nowhere.yaml" / "x", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path)


@pytest.mark.parametrize("key", ["a\\nb", "a\\u2028b", "a\\eb", "a\\ud800", "x" * 500])
def test_a_strange_key_is_reported_in_one_short_printable_line(tmp_path: Path, text: str, key: str) -> None:
    (fault,) = faults(tmp_path, text + f'"{key}": 1\n')
    assert fault.isprintable()
    assert len(fault) < 300


def test_a_key_with_half_a_surrogate_pair_is_reported_on_its_own_line(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text + '"a\\ud800": 1\n')
    assert fault.startswith("c.yaml:27: ")


PIECES = [*"{}[]:'\"|>#%\\~0", "...", "{}", "[]", "[[[[]]]]", "null", "true", "no", "-1", "1e999", ".nan", "a/*"]
PIECES += ["full", "frozen", "path", "rank", "mode"]
PIECES += [": ", ", ", "- ", "? ", "  ", "\n", "\r", "\t", "\0", "\x85", "\u2028", "\ufeff", "é", "---\n", "<<: "]
PIECES += ["&a ", "*a", "!!x ", "!y ", '"\\ud800"', '"\\n"', '"\\0"', "9" * 50, "9" * 5000, "x" * 400]
PIECES += ["mode: lora", "lora: {x: 1}", "vision: ", "weight: 0"]
MUTATION = st.tuples(st.sampled_from(["insert", "delete", "replace", "line"]), st.floats(0, 1), st.sampled_from(PIECES))


def mutated(text: str, mutations: list[tuple[str, float, str]]) -> str:
    for kind, share, piece in mutations:
        at = int(share * len(text))
        if kind == "insert":
            text = text[:at] + piece + text[at:]
        elif kind == "delete":
            text = text[:at] + text[at + len(piece) :]
        elif kind == "replace":  # the value or the key of a line
            start = text.find(": ", at) + 2
            text = text[:start] + piece + text[text.find("\n", start) :]
        else:
            lines = text.split("\n")
            lines.insert(int(share * len(lines)), lines[-1 - int(share * len(lines)) % len(lines)])
            text = "\n".join(lines)
    return text


def assert_only_plain_faults(folder: Path, text: str, *overrides: str) -> None:
    try:
        load(folder, text, *overrides)
        return
    except UserError as error:
        found = error.faults
    assert found
    for fault in found:
        assert fault.isprintable()
        assert fault.startswith((f"{folder}/c.yaml", "command line"))


@pytest.mark.slow("a fuzz test of many configs")
@settings(FUZZ, max_examples=800)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_a_mutated_config_is_taken_or_refused_in_plain_lines(
    tmp_path: Path, mutations: list[tuple[str, float, str]]
) -> None:
    (tmp_path / "model").mkdir(exist_ok=True)
    for name in ("train", "more"):
        (tmp_path / f"{name}.jsonl").touch()
    assert_only_plain_faults(tmp_path, mutated(TEXT.format(root=tmp_path), mutations))


KEYS = ["model", "path", "tune", "vision", "language", "mode", "lora", "rank", "data", "train", "0", "9", "x", "", "-1"]


OVERRIDE = st.tuples(
    st.lists(st.sampled_from(KEYS), max_size=5),
    st.one_of(st.sampled_from(PIECES), st.sampled_from(["{mode: lora}", "{mode: {}}", "[1]", "lora", "5", "[[{}]]"])),
)


@pytest.mark.slow("a fuzz test of many overrides")
@settings(FUZZ, max_examples=300)
@given(overrides=st.lists(OVERRIDE, min_size=1, max_size=4))
@example(overrides=[(["data", "train", "0"], "5"), (["data", "train", "0", "path"], "x")])
def test_strange_overrides_are_taken_or_refused_in_plain_lines(
    tmp_path: Path, overrides: list[tuple[list[str], str]]
) -> None:
    (tmp_path / "model").mkdir(exist_ok=True)
    for name in ("train", "more"):
        (tmp_path / f"{name}.jsonl").touch()
    words = [f"{'.'.join(keys)}={value}" for keys, value in overrides]
    assert_only_plain_faults(tmp_path, TEXT.format(root=tmp_path), *words)


# --- the merged config ---


def test_the_dumped_config_of_a_run_with_held_out_samples_is_read_again(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text, "data.eval={from: train, share: 0.1}")
    assert load(tmp_path, dump_config(config)) == config


WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"), min_size=1, max_size=20),
    st.sampled_from(["1e-4", "09", "010", ".5e3", "no", "null", "~", "true", "=", "<<", "1:30", "2001-01-01", "\x85"]),
    st.sampled_from([" a ", "a: b", "- a", "#a", "'", '"', "a\nb", "\ufeff", "\u2028", "*a", "&a", "!a", "%a", "@a"]),
)


@settings(FUZZ, max_examples=150)
@given(
    words=st.lists(WORDS, min_size=3, max_size=3),
    rate=st.floats(0, 10, exclude_min=True, allow_subnormal=False),
    weight=st.floats(0, 10**6, exclude_min=True, allow_subnormal=False),
    steps=st.one_of(st.none(), st.integers(11, 10**9)),
)
def test_a_dumped_config_loads_to_an_equal_one(
    tmp_path: Path, words: list[str], rate: float, weight: float, steps: int | None
) -> None:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "train.jsonl").touch()
    data = str(tmp_path / "train.jsonl")
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "tune": {
                "vision": {"mode": "full", "learning_rate": rate},
                "language": {"mode": "lora", "targets": [words[0]]},
            },
            "data": {"train": [{"path": data, "weight": weight}], "eval": [{"path": data, "name": words[1]}]},
            "train": {"steps": steps, "max_grad_norm": None},
            "run": {"output_dir": words[2]},
        }
    )
    assert load(tmp_path, dump_config(config)) == config


def test_a_dumped_config_writes_every_key_out(tmp_path: Path, text: str) -> None:
    dumped = yaml.safe_load(dump_config(load(tmp_path, text)))
    assert set(dumped) == {"model", "tune", "data", "objective", "labels", "train", "run"}
    assert set(dumped["train"]) == set(Train.model_fields)
    assert set(dumped["run"]) == set(Run.model_fields)
    assert dumped["labels"] == {"train_on": "assistant", "end_of_turn": True, "reasoning": "keep"}


# --- the schema ---


def models_under(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}

    def walk(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(models_under(annotation))
        for inner in getattr(annotation, "__args__", ()):
            walk(inner)

    for field in model.model_fields.values():
        walk(field.annotation)
    return found


def test_the_json_schema_has_every_key_with_its_meaning() -> None:
    schema = json_schema()
    objects = {"Config": schema, **schema["$defs"]}
    models = models_under(Config)
    assert len(models) == 18
    for model in models:
        written = objects[model.__name__]
        assert set(written["properties"]) == {field.alias or key for key, field in model.model_fields.items()}
        assert written["additionalProperties"] is False
        for key, field in written["properties"].items():
            assert len(field.get("description", "")) > 10, f"{model.__name__}.{key}"


def test_the_json_schema_states_what_is_required_and_the_ranges() -> None:
    schema = json_schema()
    assert schema["required"] == ["model", "data", "run"]
    assert schema["$defs"]["Run"]["required"] == ["output_dir"]
    assert "required" not in schema["$defs"]["Train"]
    assert schema["$defs"]["TrainSource"]["required"] == ["path"]
    assert schema["$defs"]["Train"]["properties"]["batch_size"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["Data"]["properties"]["too_long"]["enum"] == ["error", "drop"]
    assert schema["$defs"]["Data"]["properties"]["train"]["anyOf"][2]["minItems"] == 1


def test_every_key_of_a_config_is_read_somewhere() -> None:
    package = Path(mmtrain.__file__).parent
    read: set[str] = set()
    for file in package.rglob("*.py"):
        if "config" not in file.relative_to(package).parts:
            nodes = ast.walk(ast.parse(file.read_text()))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    leaves = {
        key
        for model in models_under(Config)
        for key, field in model.model_fields.items()
        if "mmtrain.config." not in f"{field.annotation}" and key != "mode"  # a mode becomes the part's class
    }
    assert {"rank", "packing", "too_long", "weight"} <= leaves
    assert leaves - read == {"threads"}  # read through Run.num_threads
    assert "num_threads" in read


@pytest.mark.skipif(not CONFIGS, reason="no configs are there yet")
@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "yaml-language-server: $schema=" in path.read_text().splitlines()[0]
    text = path.read_text()
    data = ROOT / "data_samples" / "quickstart" / "train.jsonl"
    overrides = [] if path.stem == "quickstart" else [f"data.train=[{{path: {data}}}]", "data.eval=[]"]
    assert load_config(path, overrides).run.output_dir
    assert set(yaml.safe_load(text)) <= {"model", "tune", "data", "objective", "labels", "train", "run"}
