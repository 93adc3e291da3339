"""What a run prints at its start about serving, and at its end about itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.schema import Config
from mmtrain.errors import UserError
from mmtrain.train.folder import locked, write_finished
from mmtrain.train.report import end_report, serving_lines
from mmtrain.train.run import train
from mmtrain.train.run_list import print_runs
from mmtrain.train.summary import SetSummary, duration, summarize
from support.learning import ALL_FULL, LORA, MIXED

STEPS = [
    {"step": 1, "loss": 3.0, "num_tokens": 1000, "num_supervised": 100, "seconds": 61.0},
    {"step": 2, "loss": 2.0, "num_tokens": 1100, "num_supervised": 110, "seconds": 62.5},
]
EVALS = [
    {"step": 0, "eval": "held-out", "perplexity": 98210.4515},
    {"step": 1, "eval": "held-out", "perplexity": 1.5},
    {"step": 2, "eval": "held-out", "perplexity": 1.75},
]


def run_with(folder: Path, rows: list[dict[str, Any]], saved: str | None) -> Path:
    """A run that has finished if it has `saved` something."""
    (folder / (saved or "checkpoints")).mkdir(parents=True)
    if saved is not None:
        write_finished(folder, max(row["step"] for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_summed_up_from_its_metrics(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", [EVALS[0], STEPS[0], EVALS[1], STEPS[1], EVALS[2]], "adapter")
    found = summarize(run)
    assert (found.num_steps, found.loss, found.num_tokens, found.num_supervised, found.seconds) == (
        2, 2.0, 2100, 210, 123.5,
    )  # fmt: skip
    assert found.evals == (SetSummary("held-out", "perplexity", 98210.4515, 1.75, 1.5, 1),)
    assert found.is_finished
    assert list(end_report(run)) == [
        "2 steps in 2:04, 2,100 tokens (210 trained on)",
        "perplexity on held-out: 98,210 before the first step, 1.7500 after the last, best 1.5000 after step 1",
        f"adapter: {run}/adapter, metrics: {run}/metrics.jsonl, config: {run}/config.yaml",
        f"next: mmtrain eval answers {run}/config.yaml --adapter {run}",
    ]


def test_the_summary_has_the_answers_next_to_the_blind_ones(tmp_path: Path) -> None:
    rows = [
        {"step": step, "metrics": {"anls": score}, "answers": "held-out", "metric": "anls"}
        | {"blind": {"anls": 0.25}, "verdict": "beats blind guessing"}
        for step, score in ((0, 0.0), (1, 0.75), (2, 0.5))
    ]
    run = run_with(tmp_path / "run", [rows[0], STEPS[0], rows[1], STEPS[1], rows[2]], "adapter")
    assert summarize(run).answers == (SetSummary("held-out", "anls", 0.0, 0.5, 0.75, 1, 0.25, "beats blind guessing"),)
    assert list(end_report(run))[1] == (
        "anls on held-out: 0.0% before the first step, 50.0% after the last, best 75.0% after step 1; best blind "
        "answer 25.0%"
    )


def test_the_summary_says_whether_the_last_answers_beat_blind_guessing(tmp_path: Path) -> None:
    row = {"answers": "held-out", "metric": "anls", "metrics": {"anls": 0.5}, "blind": {"anls": 0.5}}
    words = [{"verdict": "beats blind guessing (once)"}, {"verdict": "does not beat blind guessing (later)"}]
    rows = [{"step": step, **row, **one} for step, one in enumerate(words)]
    run = run_with(tmp_path / "run", [rows[0], STEPS[0], rows[1]], "model")
    assert list(end_report(run))[2] == "on held-out the model does not beat blind guessing (later)"


def test_the_summary_of_a_contrastive_run_has_its_retrieval(tmp_path: Path) -> None:
    steps = [{"step": 1, "loss": 1.0, "num_pairs": 9, "num_tokens": 50, "seconds": 1.0}]
    first, last = ({"step": n, "retrieval": "held-out", "image_to_text": {"recall@1": n / 2}} for n in (0, 1))
    run = run_with(tmp_path / "run", [first, *steps, last], "model")
    assert list(end_report(run)) == [
        "1 step in 0:01, 50 tokens (9 pairs)",
        "recall@1 of image_to_text on held-out: 0.0% before the first step, 50.0% after the last",
        f"model: {run}/model, metrics: {run}/metrics.jsonl, config: {run}/config.yaml",
        f"next: mmtrain eval retrieval {run}/config.yaml --adapter {run}",
    ]


def test_a_run_without_evaluations_can_be_asked_next(tmp_path: Path) -> None:
    run = run_with(tmp_path / "one", STEPS, "adapter")
    assert list(end_report(run))[-1] == f"next: mmtrain generate {run} -i"
    run = run_with(tmp_path / "of mine", STEPS, "adapter")
    assert list(end_report(run))[-1] == f"next: mmtrain generate '{run}' -i"
    run = run_with(tmp_path / "two", STEPS, "model")
    assert list(end_report(run))[-2].startswith(f"model: {run}/model, ")


def test_a_row_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", STEPS[:1], None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert summarize(run).num_steps == 1
    assert not summarize(run).is_finished
    assert summarize(tmp_path / "nothing").loss is None


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_a_duration_is_written_as_hours_minutes_and_seconds(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_finished_run_prints_its_summary(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("text", steps=2)
    train(config)
    shown = capsys.readouterr().err
    assert "serving" not in shown
    assert "\n2 steps in 0:" in shown
    assert shown.rstrip().endswith(f"next: mmtrain generate {config.run.output_dir} -i")


@pytest.mark.parametrize(
    ("tune", "reasons"),
    [
        ({"language": LORA}, None),
        ({"language": {**LORA, "variant": "rslora"}}, None),
        (ALL_FULL, None),
        (MIXED, "projector is full, vision has LoRA"),
        ({"language": {**LORA, "variant": "dora"}}, "the variant is dora"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_reported(
    tune: dict[str, Any], reasons: str | None, make_config: Callable[..., Config]
) -> None:
    config = make_config("qwen2_5_vl", tune)
    merge = f"after the run: mmtrain merge {config.run.output_dir} -o DIR"
    expected = [] if reasons is None else [f"serving: vLLM does not serve this adapter ({reasons}); {merge}"]
    assert list(serving_lines(config)) == expected


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, saved in (("a", "adapter"), ("b", None), ("c", None)):
        run = run_with(tmp_path / name, [EVALS[0], *STEPS, EVALS[2]], saved)
        (run / "config.yaml").touch()
    (tmp_path / "no-run").mkdir()
    with locked(tmp_path / "c"):
        print_runs(tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    figures = ["2", "2.0000", "held-out", "1.7500", "2:04"]
    states = {"a": "finished", "b": "stopped", "c": "running"}
    assert rows[1:] == [[name, state, *figures] for name, state in states.items()]
    print_runs(tmp_path / "a")
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(UserError, match="no run there"):
        print_runs(tmp_path / "no-run")
