"""The best checkpoint and early stopping: what they decide, and that a killed run decides the same."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmtrain.config.schema import Config
from mmtrain.errors import UserError
from mmtrain.train.eval_perplexity import PerplexityEvaluation
from mmtrain.train.folder import BEST
from mmtrain.train.run import train
from mmtrain.train.watched import Best, History, chat_names, check_watched, figure
from test_eval_in_run import with_eval

MakeConfig = Callable[..., Config]
PERPLEXITY = {0: 1.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 2.0}
"""By step, what the evaluation of a run is made to give; that before the first step counts nowhere."""
RUN = {"steps": 10, "batch_size": 2, "checkpoint_every": 3, "eval_every": 2, "keep_best": "eval/all/perplexity"}
STOP = {"metric": "eval/all/perplexity", "patience": 2}


def eval_row(step: int, name: str, nll: float, tokens: int = 1) -> dict[str, Any]:
    row = {"step": step, "eval": name, "nll": nll, "perplexity": 2.718281828459045**nll, "token_accuracy": nll / 10}
    return row | {"num_supervised": tokens, "num_samples": 1, "interval": {"perplexity": [1.0, 9.0]}}


def answer_row(step: int, name: str, score: float, number: int = 1) -> dict[str, Any]:
    return {"step": step, "answers": name, "num_answers": number, "metrics": {"exact_match": score}}


def test_figures_of_all_sources_are_means_over_tokens_and_answers() -> None:
    rows = [eval_row(2, "a", 1.0, 1), eval_row(2, "b/c", 3.0, 3), answer_row(2, "a", 0.0), answer_row(2, "b/c", 1.0, 3)]
    assert figure(rows, "eval/nll") == 2.5
    assert figure(rows, "eval/perplexity") == pytest.approx(12.182493960703473)
    assert figure(rows, "eval/b/c/perplexity") == pytest.approx(20.085536923187668)
    assert figure(rows, "answers/exact_match") == 0.75
    assert figure(rows, "answers/a/exact_match") == 0.0
    assert figure(rows, "answers/a/chrf") is None
    assert figure(rows, "answers/other/exact_match") is None
    assert figure([*rows, answer_row(2, "d", 1.0) | {"metrics": {}}], "answers/exact_match") is None
    large = eval_row(2, "a", 1.0) | {"nll": 710.0}
    assert figure([large], "eval/perplexity") == pytest.approx(1.0142320547350045e304)  # e**700


def test_the_first_of_the_best_values_is_the_best_and_step_0_counts_nowhere() -> None:
    history = History([answer_row(0, "a", 0.9)])
    assert history.best("answers/exact_match") is None
    for step, score in ((2, 0.5), (4, 0.6), (6, 0.6), (8, 0.1)):
        history.add(answer_row(step, "a", score))
    name = "answers/a/exact_match"
    assert history.best(name) == Best(4, 0.6, 0.1)
    assert history.best(name, among=(2,), since=5) == Best(6, 0.6, 0.1)
    assert history.best(name, among=(2,), since=6) == Best(6, 0.6, 0.1)
    assert history.best(name, among=(2,), since=9) == Best(2, 0.5, 0.1)
    assert history.best(name, among=(), since=9) is None
    assert not History().has_stopped_improving(name, 1)
    assert [history.has_stopped_improving(name, patience) for patience in (1, 2, 3)] == [True, True, False]


def test_lower_is_better_for_perplexity_and_higher_for_accuracy() -> None:
    history = History([eval_row(1, "a", 3.0), eval_row(2, "a", 2.0), eval_row(3, "a", 2.5)])
    best = [history.best(f"eval/{key}") for key in ("perplexity", "nll", "token_accuracy")]
    assert [one and one.step for one in best] == [2, 2, 1]


def eval_set(name: str, metric: str | None = None) -> Any:
    return SimpleNamespace(name=name, questions=metric and SimpleNamespace(questions=[SimpleNamespace(metric=metric)]))


def watching(keep_best: str | None, metric: str | None = None, answers: Any = None) -> Any:
    early = metric and SimpleNamespace(metric=metric)
    run = SimpleNamespace(keep_best=keep_best, eval_answers=answers)
    train, chat = SimpleNamespace(early_stopping=early), SimpleNamespace(kind="chat")
    return SimpleNamespace(run=run, train=train, objective=chat)


def test_what_is_watched_must_be_evaluated() -> None:
    """Of all sources together there are the figures that each of them has."""
    possible = chat_names([eval_set("a"), eval_set("b/c", "anls"), eval_set("d", "chrf")])
    known = ["eval/nll", "eval/a/perplexity", "eval/b/c/token_accuracy", "answers/exact_match", "answers/b/c/anls"]
    for name in [*known, "answers/judged", "answers/d/judged", "answers/d/exact_match"]:
        check_watched(watching(name, name, answers=True), possible)
    check_watched(watching(None), [])
    for name in ("eval/loss", "eval/e/nll", "answers/anls", "answers/a/exact_match", "answers/b/c/chrf", "answers/nll"):
        with pytest.raises(UserError) as refused:
            check_watched(watching(name, "eval/nll", answers=True), possible)
        (fault,) = refused.value.faults
        assert fault.startswith(f"run.keep_best: '{name}': expected one of 23 figures, such as ")
    with pytest.raises(UserError) as refused:
        check_watched(watching("eval/nll", "answers/anls"), [])
    assert refused.value.faults == [
        "run.keep_best: 'eval/nll': there is nothing to evaluate",
        "train.early_stopping.metric: 'answers/anls': there is nothing to evaluate (answers need run.eval_answers)",
    ]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation gives `PERPLEXITY`."""

    def row(self: PerplexityEvaluation, step: int) -> dict[str, Any]:
        found = eval_row(step, self.name, torch.tensor(PERPLEXITY[step]).log().item())
        return {key: value for key, value in found.items() if key not in ("step", "eval")}

    monkeypatch.setattr(PerplexityEvaluation, "row", row)


def config_for(make_config: MakeConfig, early_stopping: Any = None, **settings: Any) -> Config:
    config = with_eval(make_config("text", **(RUN | settings)), answers=None)
    return Config.model_validate(config.model_dump() | {"train": config.train.model_dump() | early(early_stopping)})


def early(stopping: Any) -> dict[str, Any]:
    return {"early_stopping": stopping}


def weights(config: Config, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.output_dir) / name)


def steps(config: Config) -> list[int]:
    folder = Path(config.run.output_dir) / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def interrupted_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return on_step


def assert_is_step(config: Config, folder: str, step: int) -> None:
    """The adapter in `folder` is that of the checkpoint."""
    adapter = weights(config, f"{folder}/adapter_model.safetensors")
    saved = weights(config, f"checkpoints/step-{step:06d}/trainable.safetensors")
    assert len(adapter) == len(saved) > 0
    for name, value in saved.items():
        assert torch.equal(adapter[name.replace(".default", "")], value)


@pytest.mark.slow("several runs")
def test_the_best_checkpoint_is_kept_and_exported(
    evaluated: None, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(make_config, steps=8)
    train(config)
    assert steps(config) == [4, 6, 8]
    assert_is_step(config, BEST, 4)
    assert_is_step(config, "adapter", 8)
    assert "loss of the last step" in (Path(config.run.output_dir) / BEST / "README.md").read_text()
    assert f"best: {config.run.output_dir}/best, after step 4: eval/all/perplexity 3.0000, 3.5000 at the end" in (
        capsys.readouterr().err
    )
    train(config)
    assert "has finished; larger train.steps" in capsys.readouterr().err


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("stop_at", [3, 4, 5, 8])
def test_a_killed_run_ends_early_at_the_same_step_with_the_same_bits(
    stop_at: int, evaluated: None, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 8 neither 4.0 nor 3.5 is below 3.0: the run ends, before 2.0 at step 10."""
    config = config_for(make_config, STOP)
    train(config)
    assert "ended early after step 8: eval/all/perplexity has not improved since step 4" in capsys.readouterr().err
    assert steps(config) == [4, 6, 8]
    expected = {name: weights(config, f"{name}/adapter_model.safetensors") for name in (BEST, "adapter")}
    Path(config.run.output_dir).rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=interrupted_at(stop_at))
    train(config)
    for name, found in expected.items():
        again = weights(config, f"{name}/adapter_model.safetensors")
        assert all(torch.equal(again[key], value) for key, value in found.items())
    assert steps(config) == [4, 6, 8]
    train(config)
    assert "has finished early after step 8 (train.early_stopping)" in capsys.readouterr().err


@pytest.mark.slow("several runs")
def test_a_damaged_best_checkpoint_is_said_and_the_last_one_exported(
    evaluated: None, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(make_config, steps=6)

    def damage(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            path = Path(config.run.output_dir) / "checkpoints" / "step-000004" / "trainable.safetensors"
            path.write_bytes(path.read_bytes()[:-1])

    train(config, on_step=damage)
    assert "warning: best/ is not written, because the best checkpoint is damaged" in capsys.readouterr().err
    assert_is_step(config, "adapter", 6)
    assert not (Path(config.run.output_dir) / BEST).exists()


@pytest.mark.slow("several runs")
def test_what_early_stopping_depends_on_may_not_change(evaluated: None, make_config: MakeConfig) -> None:
    config = config_for(make_config, STOP)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=interrupted_at(4))
    changed = Config.model_validate(config.model_dump() | {"run": config.run.model_dump() | {"eval_every": 4}})
    with pytest.raises(UserError, match=r"run\.eval_every: was '2' and is '4', which changes the result"):
        train(changed)
    data = Path(config.data.eval[1].path)
    data.write_text(json.dumps({"question": "a?", "answer": "b"}) + "\n")
    with pytest.raises(UserError, match=r"data\.eval\.1\.records: the content has changed"):
        train(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval/al/perplexity", "run.keep_best: 'eval/al/perplexity': expected one of eval/perplexity, eval/nll"),
        ("eval/all/loss", "eval/one/token_accuracy"),
        ("answers/exact_match", "(answers need run.eval_answers)"),
    ],
)
def test_a_metric_that_is_not_evaluated_is_refused(name: str, expected: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError) as refused:
        train(config_for(make_config, keep_best=name))
    (fault,) = refused.value.faults
    assert expected in fault
