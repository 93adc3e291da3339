"""`mmtrain eval answers`: figures worked out by hand, and a model that looks at its images next to one that cannot."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmtrain.answers.evaluation import AnswerEvaluation
from mmtrain.answers.figures import figures
from mmtrain.answers.metrics import METRICS
from mmtrain.answers.page import page_of_answers
from mmtrain.answers.report import print_report, reference_lines
from mmtrain.answers.scored_questions import ScoredQuestion
from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.data_section import MetricName
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.generate.replies import Reply
from mmtrain.progress import QUIET
from mmtrain.scoring.statistics import mean_by_sample
from support.builders import SHAPES, TINY, write_jsonl


def asked(references: Sequence[str], text: str = "colour?", metric: str = "exact_match") -> list[ScoredQuestion]:
    return [ScoredQuestion(i, "held-out", text, reference, metric) for i, reference in enumerate(references)]


def replied(texts: Sequence[str], log_probability: float = -0.5) -> dict[int, Reply]:
    return {i: Reply(text, (1, 2), True, log_probability) for i, text in enumerate(texts)}


def judged(questions: list[ScoredQuestion], **texts: Sequence[str]) -> dict[str, Any]:
    replies = {kind: replied(found) for kind, found in texts.items()}
    places = [f"eval.jsonl:{i + 1}" for i in range(len(questions))]
    return figures(questions, places, replies, {"held-out": "as configured"})


ROLES = ("user", "assistant")
COLOURS = ["red"] * 10 + ["blue"] * 6 + ["green"] * 4


def test_the_figures_of_20_answers() -> None:
    row = judged(asked(COLOURS), model=["red"] * 10 + ["Blue"] * 6 + ["green"] * 4, base=["no"] * 20)
    assert (row["num_samples"], row["num_answers"]) == (20, 20)
    assert row["metrics"] == {"exact_match": 0.7, "vqa_match": 1.0, "judged": 0.7}
    assert row["blind"] == {"exact_match": 0.5, "vqa_match": 0.5, "judged": 0.5}
    assert row["base"]["exact_match"] == 0
    assert row["swapped"] is None
    assert row["no_images"] is None
    assert row["questions"][0]["blind_answer"] == "red"
    assert [example["index"] for example in row["worst"]] == list(range(10, 16))


def test_the_base_is_only_compared_where_there_is_one() -> None:
    assert judged(asked(COLOURS), model=COLOURS)["base"] is None


@pytest.mark.parametrize(
    ("answers", "beats", "words"),
    [
        (COLOURS, True, "beats blind guessing (+50.0 points"),
        (["red"] * 20, False, "does not beat blind guessing (+0.0 points, 95 % +0.0 to +0.0: no better)"),
        (["red"] * 10 + ["blue"] + ["red"] * 9, False, "the difference may be chance"),
        (["green"] * 20, False, "does not beat blind guessing (-30.0 points"),
        (["no"] * 20, False, "blind guessing is better"),
    ],
)
def test_only_an_interval_above_0_beats_blind_guessing(answers: list[str], beats: bool, words: str) -> None:
    """One answer more than blind guessing is among 20 no proof: a third of the draws lack it."""
    row = judged(asked(COLOURS), model=answers)
    low = row["intervals"]["minus_blind"]["judged"][0]
    assert row["beats_blind"] is beats is (low > 0) is row["sources"]["held-out"]["beats_blind"]
    assert words in row["verdict"]
    assert row["verdict"] == row["sources"]["held-out"]["verdict"]


def test_the_interval_of_a_mean_follows_the_samples() -> None:
    """Twenty answers of two conversations are two draws: 0, 1/2 or 1, each end in a quarter of them."""
    samples, values = torch.arange(20).numpy() // 10, (torch.arange(20).numpy() >= 10).astype(float)
    assert mean_by_sample(samples, values) == (0.5, (0.0, 1.0))
    mean, (low, high) = mean_by_sample(torch.arange(20).numpy(), values)
    assert (mean, 0.2 < low < 0.35, 0.65 < high < 0.8) == (0.5, True, True)


def test_answers_are_weighted_alike_in_samples_of_unequal_size() -> None:
    mean, _ = mean_by_sample(torch.tensor([0, 0, 0, 1]).numpy(), torch.tensor([1.0, 1, 1, 0]).numpy())
    assert mean == 0.75


def test_each_source_is_judged_by_its_own_metric() -> None:
    boxes = [ScoredQuestion(i, "boxes", "where?", f"[{i}, 0, {i + 2}, 2]", "box_iou") for i in range(2)]
    words = [ScoredQuestion(i + 2, "words", "what?", text, "exact_match") for i, text in enumerate(["a", "b"])]
    replies = {"model": replied(["[0, 0, 2, 2]", "nowhere", "a", "x"])}
    row = figures([*boxes, *words], ["p"] * 4, replies, {"boxes": "", "words": ""})
    assert row["sources"]["boxes"]["means"] == {"model": 0.5, "blind": pytest.approx((1 + 1 / 3) / 2)}
    assert row["sources"]["boxes"]["num_of_other_form"] == 1
    assert row["sources"]["words"]["means"] == {"model": 0.5, "blind": 0.5}
    assert row["metrics"] == {"exact_match": 0.5, "vqa_match": 0.5, "box_iou": 0.5, "judged": 0.5}


def test_surprising_are_the_wrong_answers_that_the_model_is_sure_of() -> None:
    replies = {"model": {i: Reply(text, (1,), i != 1, -float(i)) for i, text in enumerate("xaxx")}}
    row = figures(asked(["a"] * 4), ["p"] * 4, replies, {"held-out": ""})
    assert [example["index"] for example in row["surprising"]] == [0, 2, 3]
    assert row["surprising"][0]["probability"] == 1
    assert row["num_incomplete"] == 1


def test_references_that_repeat_are_classes_with_an_accuracy_each() -> None:
    answers = ["red"] * 8 + ["blue", "<think>hm</think>blue"] + ["red"] * 3 + ["blue"] * 3 + ["green"] * 4
    row = judged(asked(COLOURS), model=answers)
    found = [list(one.values()) for one in row["references"]]
    assert found == [
        ["held-out", "red", 10, 0.8, "blue", 2],
        ["held-out", "blue", 6, 0.5, "red", 3],
        ["held-out", "green", 4, 1.0, None, 0],
    ]
    assert list(reference_lines(row)) == ["held-out: mean over 3 references 76.7%"]
    assert judged(asked([f"a {n}" for n in range(20)]), model=["a 1"] * 20)["references"] == []


def test_the_fields_of_json_have_a_score_each() -> None:
    references = ['{"id": "A", "lines": [{"price": 1}, {"price": 2.0}], "note": null}', '{"id": "B", "lines": []}']
    answers = ['```json\n{"id": "A", "lines": [{"price": 1}, {"price": 3}], "vat": 7}\n```', "no JSON"]
    asked_for = [ScoredQuestion(i, "held-out", "read", text, "json_accuracy") for i, text in enumerate(references)]
    row = judged(asked_for, model=answers)
    assert row["references"] == []
    assert [list(one.values()) for one in row["fields"]] == [
        ["held-out", "id", 2, 0.5, 0],
        ["held-out", "lines.*.price", 2, 0.5, 0],
        ["held-out", "note", 1, 0.0, 0],
        ["held-out", "vat", 0, None, 1],
        ["held-out", "lines", 1, 0.0, 0],
    ]


def test_the_report_says_everything() -> None:
    answers = ["red"] * 10 + ["[bold]x\x1b[/bold]", ""] * 5
    row = judged(asked(COLOURS, "[i]colour?"), model=answers, base=["no"] * 20)
    console = Console(file=io.StringIO(), width=80, highlight=False, emoji=False, markup=False)
    print_report(row, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b" not in text
    for words in (
        "held-out: exact_match (as configured), 20 answers",
        "the model",
        "best blind answer",
        "the base model",
    ):
        assert words in text
    assert "swapped" not in text
    assert "eval.jsonl:12  [i]colour?  →  (no text)  (reference: blue; score 0.00, " in text
    assert "eval.jsonl:11  [i]colour?  →  [bold]x\\u{1b}[/bold]  (reference: blue; score 0.00, 61% sure)" in text
    assert "The model does not beat blind guessing" in text.splitlines()[-2]


def test_the_config_knows_every_metric() -> None:
    assert get_args(MetricName) == tuple(METRICS)


def shapes(folder: Path, num: int) -> Path:
    """Questions of easy-VQA on held-out images."""
    rows = json.loads((SHAPES / "test.json").read_text(encoding="utf-8"))
    open_questions = [row for row in rows if row["conversations"][1]["value"] not in ("yes", "no")]
    return write_jsonl(folder / "eval.jsonl", open_questions[:num])


def config_for(folder: Path, model: Path = TINY, num: int = 40, **source: Any) -> Path:
    eval_source = {"path": str(shapes(folder, num)), "root": str(SHAPES), "name": "shapes", **source}
    config = Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": [{"path": eval_source["path"], "root": str(SHAPES)}], "eval": [eval_source]},
            "run": {"output_dir": str(folder / "run")},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, ["eval", "answers", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def blind_model(folder: Path) -> Path:
    """The tiny model, whose projector gives 0 for every image."""
    path = shutil.copytree(TINY, folder / "blind")
    weights = load_file(path / "model.safetensors")
    dropped = [name for name in weights if ".merger.mlp.2" in name]
    assert dropped
    save_file(weights | {name: weights[name] * 0 for name in dropped}, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_model_that_looks_beats_blind_guessing(tmp_path: Path) -> None:
    row = json.loads(run(config_for(tmp_path), "--json", "--html", tmp_path / "page.html"))
    assert row["num_samples"] == 40
    assert row["beats_blind"] is True
    assert row["metrics"]["exact_match"] > 0.9
    questions = [json.loads(line)["conversations"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    by_question: dict[str, list[str]] = {}
    for question, answer in questions:
        by_question.setdefault(question["value"], []).append(answer["value"])
    groups = [found for found in by_question.values() if len(found) > 1]
    groups.append([found[0] for found in by_question.values() if len(found) == 1])
    assert row["blind"]["exact_match"] == pytest.approx(sum(max(map(found.count, found)) for found in groups) / 40)
    assert row["intervals"]["minus_blind"]["exact_match"][0] > 0
    assert row["swapped"]["exact_match"] < row["metrics"]["exact_match"] - 0.3
    assert row["intervals"]["minus_swapped"]["exact_match"][0] > 0
    assert row["no_images"]["exact_match"] < row["metrics"]["exact_match"] - 0.3


@pytest.mark.slow("two processes")
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    path = config_for(tmp_path, num=12)
    expected = json.loads(run(path, "--json", "--batch-size", "5"))
    command = [sys.executable, "-m", "mmtrain", "eval", "answers", str(path), "--json", "--batch-size", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*command, "--processes", "2"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow("two evaluations")
def test_one_question_at_a_time_gives_the_figures_of_16(tmp_path: Path) -> None:
    """Also of those with swapped images and without images, and the same wrong answers."""
    path = config_for(tmp_path, num=20)
    alone, together = (json.loads(run(path, "--json", "--batch-size", size)) for size in (1, 16))
    for row in (alone, together):
        row["worst"] = sorted((one["place"], one["answer"]) for one in row["worst"])
        del row["surprising"]  # ordered by probabilities, which differ within rounding
    assert alone == together
    assert alone["swapped"] != alone["metrics"]


def test_a_model_that_sees_nothing_does_not_beat_blind_guessing(tmp_path: Path) -> None:
    text = run(config_for(tmp_path, blind_model(tmp_path)))
    assert "The model does not beat blind guessing" in " ".join(text.split())
    assert "beats blind" not in text


def test_a_metric_that_cannot_compare_a_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.jsonl:1: box_iou cannot compare '\w+': set another `metric`"):
        run(config_for(tmp_path, num=2, metric="box_iou"))


def test_the_option_takes_the_place_of_the_configured_metric(tmp_path: Path) -> None:
    row = json.loads(run(config_for(tmp_path, num=4, metric="anls"), "--json", "--metric", "chrf"))
    assert (row["sources"]["shapes"]["metric"], row["sources"]["shapes"]["reason"]) == ("chrf", "as configured")


def test_an_unknown_metric_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--metric 'bleu': expected one of exact_match, vqa_match"):
        run(config_for(tmp_path, num=2), "--metric", "bleu")


def test_every_trained_reply_is_a_question(tmp_path: Path) -> None:
    turns = [("1?", "one"), ("2?", "two")]
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(ROLES, pair, strict=True)]
    data = write_jsonl(tmp_path / "turns.jsonl", [{"messages": messages}])
    path = config_for(tmp_path, num=2)
    config = Config.model_validate(Config.model_validate(load(path)).model_dump())
    sources = [config.data.eval[0].model_copy(update={"path": str(data), "root": None})]
    evaluation = AnswerEvaluation(config, sources, load_processor(str(TINY)), QUIET)
    assert [(question.text, question.reference) for question in evaluation.questions] == turns
    assert {question.sample for question in evaluation.questions} == {0}


def load(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def test_the_page_escapes_what_samples_say(tmp_path: Path) -> None:
    path = config_for(tmp_path, num=2)
    config = Config.model_validate(load(path))
    samples = AnswerEvaluation(config, config.data.eval, load_processor(str(TINY)), QUIET).samples
    row = judged(asked(["<b>red</b>", "blue"], "<script>alert(1)</script>"), model=["<img src=x>", ""])
    page = page_of_answers(row | {"dropped": []}, samples)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("data:image/png;base64,") == 4  # both samples, among the worst and among the surprising
    assert page.count("(no text)") == 2
    assert "http" not in page.replace("http-equiv", "")
