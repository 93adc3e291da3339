"""`mmtrain report`: its figures are those of the files of the run, and text from outside stays text."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmtrain import api
from mmtrain.cli import main
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.report.chart import bar_chart, line_chart, short_number
from mmtrain.report.compare import differing_keys
from mmtrain.report.page import write_report
from mmtrain.report.series import Series, num_averaged, smoothed, thinned

MakeConfig = Callable[..., Config]
HOSTILE = "</style><script>alert(1)</script>\u202e&lt;"


def row(step: int, loss: float) -> dict[str, Any]:
    figures = {"num_tokens": 100, "num_supervised": 20, "learning_rate": 0.01, "grad_norm": 1.5, "seconds": 0.5}
    return {"step": step, "loss": loss, **figures, "mfu": 0.25}


def write_run(folder: Path, losses: list[float], name: str = "held-out", **config: Any) -> Path:
    folder.mkdir()
    sections = {"model": {"path": "a/model"}, "train": {"seed": 0}, "run": {"output_dir": str(folder)}} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    rows: list[dict[str, Any]] = [{"step": 0, "eval": name, "perplexity": 5000.0, "token_accuracy": 0.1}]
    rows += [row(step, loss) for step, loss in enumerate(losses, 1)]
    rows += [{"step": len(losses), "eval": name, "perplexity": 2.5, "token_accuracy": 0.7}]
    answers = {"answers": name, "metric": "exact_match", "num_answers": 4, "verdict": "beats blind guessing"}
    answers |= {"blind": {"exact_match": 0.25}, "beats_blind": True}
    rows += [{"step": len(losses), **answers, "metrics": {"exact_match": 0.75}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_report(runs, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def texts(page: str) -> str:
    """The text of a page without its tags, in one line."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


# --- series


def test_the_average_is_that_of_the_values_up_to_each_one() -> None:
    values = np.random.default_rng(0).normal(size=70)
    assert num_averaged(len(values)) == 7
    expected = [sum(values[max(0, i - 6) : i + 1]) / min(7, i + 1) for i in range(70)]
    np.testing.assert_allclose(smoothed(values), expected, rtol=1e-12)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1), (9, 1), (40, 4), (500, 50), (10**6, 50)])
def test_a_short_run_is_averaged_over_fewer_steps(num_steps: int, expected: int) -> None:
    assert num_averaged(num_steps) == expected


def test_a_thinned_series_keeps_its_ends_and_every_extreme() -> None:
    values = np.sin(np.arange(100_000) / 5000)
    values[[123, 45_678, 99_000]] = 40.0, -30.0, 20.0
    made = thinned(Series("loss", np.arange(100_000.0), values))
    assert len(made.values) <= 802
    assert {40.0, -30.0, 20.0} <= set(made.values)
    assert (made.steps[0], made.steps[-1]) == (0, 99_999)
    assert (np.diff(made.steps) > 0).all()
    assert (values[made.steps.astype(int)] == made.values).all()


# --- charts


def test_points_lie_where_the_ticks_say() -> None:
    chart = line_chart("Loss", [Series("a", np.array([0.0, 5.0, 10.0]), np.array([0.0, 2.0, 4.0]), marked=True)])
    assert chart is not None
    at = {tick.label: tick.at for tick in chart.y_ticks}
    across = {tick.label: tick.at for tick in chart.x_ticks}
    assert [(x, y) for x, y, _ in chart.lines[0].points] == [
        (across["0"], at["0"]),
        (pytest.approx((across["4"] + across["6"]) / 2, abs=0.1), at["2"]),
        (across["10"], at["4"]),
    ]
    assert at["0"] > at["4"]  # upwards


def test_a_wide_range_is_logarithmic_only_where_that_is_allowed() -> None:
    series = [Series("a", np.array([1.0, 2.0]), np.array([1.0, 1e4]), marked=True)]
    plain, log = line_chart("Rate", series), line_chart("Loss", series, allow_log=True)
    assert plain is not None
    assert log is not None
    assert (plain.is_log, log.is_log) == (False, True)
    ticks = {tick.label: tick.at for tick in log.y_ticks}
    assert ticks["100"] == pytest.approx((ticks["1"] + ticks["10,000"]) / 2, abs=0.2)


@pytest.mark.parametrize("allow_log", [False, True])
def test_labels_of_large_figures_fit_next_to_the_axis(allow_log: bool) -> None:
    """About 7 pixels a character, left of the axis."""
    steps, values = np.arange(3.0), np.array([2_000_000.0, 90_000.0, 1.0])
    chart = line_chart("Perplexity", [Series("a", steps, values)], allow_log=allow_log)
    assert chart is not None
    assert any(float(tick.label.replace(",", "")) >= 1e6 for tick in chart.y_ticks)
    assert max(len(tick.label) for tick in chart.y_ticks) * 7 <= chart.left - 6


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [float("nan"), 1.0], [1e-9, 2e-9], [-5.0, 5.0]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    chart = line_chart("Loss", [Series("a", np.arange(float(len(values))), np.array(values))], allow_log=True)
    assert chart is not None
    assert len(chart.y_ticks) >= 2
    assert all(chart.top - 1 <= tick.at <= chart.bottom + 1 for tick in chart.y_ticks)


def test_without_a_finite_value_there_is_no_chart() -> None:
    assert line_chart("Loss", [Series("a", np.array([1.0]), np.array([np.inf]))]) is None


def test_bars_are_as_high_as_their_counts() -> None:
    chart = bar_chart("Lengths", "tokens", [(10, 19), (20, 29), (30, 39)], [4, 0, 8])
    low, high = chart.bars
    assert high.height == pytest.approx(2 * low.height, abs=0.2)
    assert [bar.label for bar in chart.bars] == ["10–19: 4", "30–39: 8"]


@pytest.mark.parametrize(
    ("value", "expected"), [(98210.45, "98,210"), (1.24561, "1.246"), (0.0, "0"), (3.2e-05, "3.2e-05"), (0.5, "0.5")]
)
def test_figures_are_short(value: float, expected: str) -> None:
    assert short_number(value) == expected


# --- the page


def test_the_page_has_the_figures_of_the_run(tmp_path: Path) -> None:
    page = texts(page_of(tmp_path, write_run(tmp_path / "a", [9.0, 5.0, 3.0])))
    for expected in (
        "A run that has not finished of a/model",
        "steps 3",
        "tokens 300",
        "loss 9 → 3",
        "perplexity, held-out 5,000 → 2.5",
        "exact_match, held-out 75.0% (blind 25.0%)",
        "held-out, step 3: 2.5",
    ):
        assert expected in page, expected


def test_a_contrastive_run_shows_its_retrieval(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0], objective={"kind": "contrastive"})
    before = {"image_to_text": {"recall@1": 0.125, "chance": {}}, "text_to_image": {"recall@1": 0.0}}
    both = {"image_to_text": {"recall@1": 0.25, "chance": {}}, "text_to_image": {"recall@1": 0.5}}
    with (run / "metrics.jsonl").open("a") as file:
        for step, found in ((0, before), (2, both)):
            file.write(json.dumps({"step": step, "retrieval": "held-out", **found}) + "\n")
    page = texts(page_of(tmp_path, run))
    assert "Recall@1 (share of searches)" in page
    assert "recall@1, image to text, held-out 12.5% → 25.0%" in page
    assert "recall@1, text to image, held-out 0.0% → 50.0%" in page
    assert "held-out, image to text, step 2: 0.25" in page
    assert "held-out, text to image, step 2: 0.5" in page
    assert "Loss (nats)" in page


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [9.0, 5.0], train={"seed": 0, "epochs": None})
    second = write_run(tmp_path / "second", [8.0, 4.0], train={"seed": 7, "epochs": None})
    page = texts(page_of(tmp_path, first, second))
    assert "key first second train.seed 0 7 Curves" in page
    assert "first, held-out" in page
    assert "second, held-out" in page


def test_differing_keys_have_every_value() -> None:
    one, two = {"a": {"b": [1, {"c": None}]}, "same": 1}, {"a": {"b": [2]}, "same": 1, "new": True}
    assert differing_keys([one, two]) == [("a.b.0", ["1", "2"]), ("a.b.1.c", ["null", "–"]), ("new", ["–", "true"])]


def test_a_section_that_a_run_lacks_is_shown_by_its_keys_alone() -> None:
    one: dict[str, Any] = {"run": {"answers": None, "x": {}}}
    two: dict[str, Any] = {"run": {"answers": {"every": 2, "num": {"least": 1}}, "x": {}}}
    expected = [("run.answers.every", ["–", "2"]), ("run.answers.num.least", ["–", "1"])]
    assert differing_keys([one, two]) == expected
    assert differing_keys([two, one]) == [(key, values[::-1]) for key, values in expected]


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [1.0], HOSTILE, model={"path": HOSTILE})
    (run / "dropped.jsonl").write_text(json.dumps({"place": HOSTILE, "reason": HOSTILE}) + "\n")
    (run / "answers").mkdir()
    example = dict.fromkeys(("source", "place", "question", "reference", "answer"), HOSTILE) | {"score": 0.0}
    for step in (0, 1):
        (run / "answers" / f"step-{step:06d}.jsonl").write_text(json.dumps(example) + "\n")
    page = page_of(tmp_path, run)
    assert "<script" not in page
    assert page.count("</style>") == 1
    assert texts(page).count("</style><script>alert(1)</script>") >= 8


def test_a_run_that_is_being_written_is_read_up_to_its_last_whole_row(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "steps 2" in texts(page_of(tmp_path, run))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run there \(it has no config.yaml\)"):
        page_of(tmp_path, tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="has taken no step yet"):
        page_of(tmp_path, tmp_path)


# --- the command


def test_json_has_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0])
    monkeypatch.setattr("sys.argv", ["mmtrain", "report", str(run), "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["num_steps"], found["num_tokens"], found["loss"], found["is_finished"]) == (2, 200, 2.0, False)
    assert found["perplexity"]["held-out"] == {"first": 5000.0, "last": 2.5, "best": 2.5, "best_step": 2}
    assert found["answers"]["held-out"]["metrics"] == {"exact_match": 0.75}


def test_a_finished_run_has_a_report_with_its_data(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("text", steps=2)
    path = Path(config.data.train[0].path)
    first, second, *_ = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [*path.read_text().splitlines(), first, second, first]))
    folder = api.train(config)
    assert f"report: {folder}/report.html" in capsys.readouterr().err
    page = texts((folder / "report.html").read_text(encoding="utf-8"))
    assert "A finished run" in page
    facts = json.loads((folder / "facts.json").read_text())
    lines = Path(config.data.train[0].path).read_text().splitlines()
    assert facts["train"]["num_samples"] == len(lines) == sum(facts["train"]["lengths"]["counts"])
    assert facts["train"]["num_duplicates"] == 3
    assert re.search(r"too long, dropped faulty, skipped duplicates training 11 .* 0 0 3 ", page)
    (language,) = [one for one in facts["components"] if one["component"] == "language"]
    assert f"language lora {language['num_modules']} {language['trainable']:,}" in page


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmtrain.report.after_run.write_report", no_room)
    folder = api.train(make_config("text", steps=1))
    assert "report.html: not written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert (folder / "adapter").is_dir()
