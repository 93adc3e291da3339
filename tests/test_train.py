"""Whole runs: what they leave, that they continue exactly, and that what changes the result is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from mmtrain.config import load_config
from mmtrain.config.schema import Config
from mmtrain.errors import NonFiniteError, UserError
from mmtrain.generate.prompts import prompt_for
from mmtrain.generate.target import find_target, load_target
from mmtrain.merge.command import merge
from mmtrain.records.chat import Conversation, Message, Text
from mmtrain.runtime.processes import Runtime
from mmtrain.train import loop, run
from mmtrain.train.folder import start_over
from mmtrain.train.run import train
from mmtrain.train.step import StepResult, train_step
from mmtrain.train.summary import summarize
from support.learning import LORA, MIXED

MakeConfig = Callable[..., Config]
SMALL = {"steps": 6, "batch_size": 3, "checkpoint_every": 2, "eval_every": 3}


def with_eval(config: Config) -> Config:
    source = {"path": config.data.train[0].path, "name": "held-out"}
    return Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | {"eval": [source]}})


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def adapter(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.output_dir) / "adapter" / "adapter_model.safetensors")


def test_on_step_gets_the_row_of_each_step_and_can_leave_the_run(make_config: MakeConfig) -> None:
    config = make_config("text", **SMALL)
    found: list[dict[str, Any]] = []

    def on_step(row: dict[str, Any]) -> None:
        found.append(row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=on_step)
    written = [row for row in rows(config) if "eval" not in row]
    assert [row["step"] for row in written] == [1, 2, 3]
    assert [{key: row[key] for key in row if key != "operations"} for row in found] == written
    rates = [row["operations"] / row["seconds"] / row["mfu"] for row in found]  # the machine's, the same in every step
    assert rates == pytest.approx([rates[0]] * 3)
    assert 1e8 < rates[0] < 1e15


def test_a_run_leaves_metrics_config_checkpoints_and_an_adapter_that_peft_loads(
    kind: str, make_config: MakeConfig
) -> None:
    tune = MIXED if kind != "text" else {"language": LORA}
    config = with_eval(make_config(kind, tune, **SMALL))
    train(config)
    output = Path(config.run.output_dir)

    steps = [row for row in rows(config) if "eval" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "num_tokens", "num_supervised", "learning_rate", "grad_norm", "seconds", "mfu"}
    assert all(row.keys() == keys for row in steps)
    assert [row["step"] for row in rows(config) if row.get("eval") == "held-out"] == [0, 3, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_config(output / "config.yaml") == config
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-000004", "step-000006"]

    load = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    base = load.from_pretrained(config.model.path, dtype=torch.float32)
    before = base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    tuned = PeftModel.from_pretrained(base, output / "adapter")
    after = tuned(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    assert (after - before).abs().max() > 1e-3
    last = load_file(output / "checkpoints" / "step-000006" / "trainable.safetensors")
    loaded = {name: p for name, p in tuned.named_parameters() if "lora_" in name or "modules_to_save" in name}
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[name], loaded[name]) for name in last)
    assert (output / "adapter" / "tokenizer.json").read_bytes() == (
        Path(config.model.path) / "tokenizer.json"
    ).read_bytes()
    assert "base_model" in (output / "adapter" / "README.md").read_text()


def test_without_lora_a_whole_model_is_left(make_config: MakeConfig) -> None:
    tune = {"projector": {"mode": "full"}, "language": {"mode": "full", "learning_rate": 1e-3}}
    config = make_config("llava", tune, **SMALL)
    train(config)
    output = Path(config.run.output_dir)
    assert not (output / "adapter").exists()
    model = AutoModelForImageTextToText.from_pretrained(output / "model")
    weights = load_file(output / "checkpoints" / "step-000006" / "trainable.safetensors")
    for name, parameter in model.named_parameters():
        assert (name in weights) == ("vision_tower" not in name)
        assert name not in weights or torch.equal(parameter, weights[name])
    assert (output / "model" / "chat_template.jinja").is_file()


DASHES = (
    "{% for m in messages %}- {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}- {% endif %}"
)


@pytest.mark.slow("a run")
def test_a_given_chat_template_is_trained_with_and_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    """The adapter's directory, `generate` and a merged model have it; another content does not resume."""
    (tmp_path / "dashes.jinja").write_text(DASHES)
    config = make_config("qwen2_5_vl", {"language": LORA}, **SMALL)
    model = config.model.model_copy(update={"chat_template": str(tmp_path / "dashes.jinja")})
    config = config.model_copy(update={"model": model})
    train(config)
    adapter = Path(config.run.output_dir) / "adapter"
    (tmp_path / "dashes.jinja").write_text(DASHES.replace("- ", "* "))
    with pytest.raises(UserError, match=r"model.template: the content has changed"):
        train(config)
    assert [path.name for path in adapter.glob("chat_template*")] == ["chat_template.jinja"]
    assert AutoTokenizer.from_pretrained(adapter).chat_template == DASHES
    merge(adapter.parent, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == DASHES
    loaded = load_target(find_target(str(adapter.parent), dtype="float32"), Runtime("float32"))
    asked = Conversation((Message("user", (Text("what?"),)),))
    prompt = prompt_for(loaded.encoder, asked, tmp_path)
    assert loaded.encoder.processor.tokenizer.decode(prompt.ids.tolist()) == "- what?<|im_end|>\n- "


class Stop(Exception):
    """Stands for a process that dies."""


OTHER_STEPS = [pytest.param(step, marks=pytest.mark.slow("stops after other steps")) for step in (1, 3, 5)]


@pytest.mark.parametrize("stop_at", [2, *OTHER_STEPS])
def test_a_stopped_run_continues_to_the_same_bits(
    stop_at: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tune = {"vision": LORA, "language": {**LORA, "dropout": 0.1}}
    config = with_eval(make_config("qwen2_5_vl", tune, **SMALL, microbatch_tokens=60))
    train(config)
    whole, whole_rows = adapter(config), rows(config)
    shutil.rmtree(config.run.output_dir)

    take = train_step

    def die(learner: Any, batches: Any, num_supervised: int, step: int, norm: float | None) -> StepResult:
        result = take(learner, batches, num_supervised, step, norm)
        if step == stop_at:
            raise Stop
        return result

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.setattr(loop, "train_step", take)
    train(config)
    again = adapter(config)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    timeless = [[{**row, "seconds": 0, "mfu": 0} for row in found] for found in (rows(config), whole_rows)]
    assert timeless[0] == timeless[1]


@pytest.mark.slow("several runs")
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("text", **SMALL)
    train(config)
    whole = adapter(config)
    output = Path(config.run.output_dir)
    shutil.rmtree(output / "adapter")
    broken = output / "checkpoints" / "step-000006" / "trainable.safetensors"
    content = bytearray(broken.read_bytes())
    content[-3] ^= 1
    broken.write_bytes(content)
    train(config)
    said = capsys.readouterr().err
    assert f"{broken.parent}: trainable.safetensors is not what was written" in said
    assert "step-000004" in said
    again = adapter(config)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def changed(config: Config, key: str, value: Any) -> Config:
    data = config.model_dump(mode="json")
    section, _, name = key.partition(".")
    data[section] = {**data[section], name: value}
    return Config.model_validate(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 5),
        ("train.batch_size", 4),
        ("train.learning_rate", 0.02),
        ("train.schedule", "linear"),
        ("train.seed", 1),
        ("train.weight_decay", 0.1),
        ("train.max_grad_norm", None),
        ("labels.train_on", "last"),
        ("labels.end_of_turn", False),
        ("tune.language", {"mode": "lora", "rank": 8, "alpha": 8.0}),
    ],
)
def test_a_change_of_the_result_is_refused_by_name(
    key: str, value: Any, make_config: MakeConfig, shared_run: Config
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(shared_run.run.output_dir).rglob("*")}
    with pytest.raises(UserError) as refused:
        train(changed(shared_run, key, value))
    assert any(fault.startswith(key) for fault in refused.value.faults)
    assert {path: path.stat().st_mtime_ns for path in Path(shared_run.run.output_dir).rglob("*")} == before


@pytest.mark.slow("several runs")
def test_a_finished_run_with_a_constant_rate_is_extended_to_the_bits_of_a_longer_one(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = {"language": {**LORA, "dropout": 0.1}}
    config = make_config("text", tune, **SMALL, schedule="constant", warmup_steps=2)
    longer = changed(config, "train.steps", 9)
    train(changed(longer, "run.output_dir", str(tmp_path / "whole")))
    train(config)
    capsys.readouterr()
    train(longer)
    line = "extended from 6 to 9 steps: the rate is constant, so the result is that of 9 steps from the start"
    assert line in capsys.readouterr().err.splitlines()
    whole, extended = adapter(changed(longer, "run.output_dir", str(tmp_path / "whole"))), adapter(longer)
    assert all(torch.equal(whole[name], extended[name]) for name in whole)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000009" / "state.json").read_text())
    assert state["accepted"] == ["step 6: train.steps: was '6' and is '9'"]


@pytest.mark.slow("several runs")
def test_an_extension_says_what_the_rate_does(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Epochs of 3 steps; the line falls to 0 in 6 steps, and then in 9."""
    config = make_config("text", epochs=2, batch_size=3, learning_rate=0.01, schedule="linear")
    train(config)
    train(changed(config, "train.epochs", 3))
    line = (
        "extended from 6 to 9 steps: the rate was 1.67e-03 in step 6 and is 3.33e-03 in step 7, on the linear of 9 "
        "steps; 9 steps from the start would give another result"
    )
    assert line in capsys.readouterr().err.splitlines()
    rates = [row["learning_rate"] for row in rows(config)]
    assert rates[5:7] == pytest.approx([0.01 / 6, 0.01 * 3 / 9])
    assert len(rates) == 9


@pytest.mark.slow("several runs")
def test_an_extended_run_is_not_finished_until_it_is_exported_again(make_config: MakeConfig) -> None:
    """The adapter of the shorter run is there all the time."""
    config = make_config("text", **SMALL)
    longer = changed(config, "train.steps", 8)
    train(config)
    short = adapter(config)
    assert summarize(Path(config.run.output_dir)).is_finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_outputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(longer)
    assert not summarize(Path(config.run.output_dir)).is_finished
    assert all(torch.equal(short[name], value) for name, value in adapter(longer).items())
    train(longer)
    assert any(not torch.equal(short[name], value) for name, value in adapter(longer).items())
    assert summarize(Path(config.run.output_dir)).is_finished


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_change_of_the_data_is_refused(shared_run: Config) -> None:
    data = Path(shared_run.data.train[0].path)
    content = data.read_text()
    data.write_text("\n".join(content.splitlines()[:-1]))
    try:
        with pytest.raises(UserError, match=r"data\.train\.0\.records: the content has changed"):
            train(shared_run)
    finally:
        data.write_text(content)


@pytest.mark.slow("a run for each key")
def test_what_only_changes_the_computing_is_taken_and_fresh_starts_over(shared_run: Config) -> None:
    output = Path(shared_run.run.output_dir)
    whole = adapter(shared_run)
    shutil.rmtree(output / "checkpoints" / "step-000006")
    shutil.rmtree(output / "adapter")
    train(changed(shared_run, "run.microbatch_tokens", 40))
    again = adapter(shared_run)
    difference = sum(float((whole[n] - again[n]).pow(2).sum()) for n in whole) ** 0.5
    assert 0 < difference <= 1e-4 * sum(float(whole[n].pow(2).sum()) for n in whole) ** 0.5
    start_over(output)
    train(changed(shared_run, "train.seed", 5))
    assert [row["step"] for row in rows(shared_run)] == [1, 2, 3, 4, 5, 6]
    start_over(output)
    train(shared_run)


@pytest.mark.slow("a run for each key")
def test_only_changes_that_may_change_bits_are_reported_on_resume(
    shared_run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (key, value, reported) in enumerate(
        [
            ("run.hang_timeout", 1000.0, ""),
            ("run.eval_every", 2, ""),
            ("data.decode_images", False, ""),
            ("run.packing", False, "packing auto → False"),
            ("run.activation_checkpointing", True, "activation_checkpointing auto → True"),
        ]
    ):
        output = Path(shared_run.run.output_dir).with_name(f"resumed-{number}")
        shutil.copytree(shared_run.run.output_dir, output)
        train(changed(changed(shared_run, key, value), "run.output_dir", str(output)))
        printed = [line for line in capsys.readouterr().err.splitlines() if "its bits may differ" in line]
        expected = f"the result is the same within rounding, its bits may differ: {reported}"
        assert printed == ([expected] if reported else [])


@pytest.fixture(scope="module")
def shared_run(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One finished run of a text model."""
    from support.builders import mixed_rows, train_and_run, write_jsonl

    folder = tmp_path_factory.mktemp("shared-run")
    data = write_jsonl(folder / "data" / "mixed.jsonl", mixed_rows(folder / "data", with_images=False))
    config = Config.model_validate(
        {
            "model": {"path": str(model_dirs["text"]), "dtype": "float32"},
            "tune": {"language": LORA},
            "data": {"train": [{"path": str(data)}]},
            **train_and_run(output_dir=str(folder / "run"), learning_rate=1e-2, **SMALL),
        }
    )
    train(config)
    return config


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_samples(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("text", **SMALL)
    take = train_step

    def poison(learner: Any, batches: Any, num_supervised: int, step: int, norm: float | None) -> StepResult:
        if step == 4:
            weight = next(p for p in learner.model.parameters() if p.requires_grad)
            weight.data[0, 0] = float("nan")
        return take(learner, batches, num_supervised, step, norm)

    monkeypatch.setattr(loop, "train_step", poison)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan.*mixed\.jsonl:\d") as stopped:
        train(config)
    assert str(stopped.value).count("mixed.jsonl:") == 3
    assert NonFiniteError.exit_code == 6
    assert [row["step"] for row in rows(config)] == [1, 2, 3]
    assert not (Path(config.run.output_dir) / "checkpoints" / "step-000004").exists()


def test_dropped_samples_are_counted_and_listed(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("text", **SMALL)
    data = config.model_dump()
    data["data"] |= {"max_length": 40, "too_long": "drop"}
    train(Config.model_validate(data))
    listed = [json.loads(line) for line in (Path(config.run.output_dir) / "dropped.jsonl").read_text().splitlines()]
    assert listed
    assert all("over the 40 allowed" in row["reason"] for row in listed)
    assert f"{len(listed)} samples dropped as too long" in capsys.readouterr().err


@pytest.mark.slow("a run")
def test_bfloat16_keeps_trainable_weights_in_float32(make_config: MakeConfig) -> None:
    config = make_config("qwen2_5_vl", MIXED, **SMALL)
    config = changed(config, "model.dtype", "bfloat16")
    train(config)
    weights = adapter(config)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    losses = [row["loss"] for row in rows(config)]
    assert losses[-1] < losses[0]


def test_the_config_of_a_run_is_plain_yaml(shared_run: Config) -> None:
    text = (Path(shared_run.run.output_dir) / "config.yaml").read_text()
    assert yaml.safe_load(text) == shared_run.model_dump(mode="json")
