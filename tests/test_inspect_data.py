"""`mmtrain inspect-data`: what is counted, what training and evaluation data share, and the page."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmtrain.cli import app
from support.builders import TINY, write_jsonl

HOSTILE = "<script>alert(1)</script>"


def chat(question: str, answer: str, *images: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": "<image>" * len(images) + question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **({"images": list(images)} if images else {})}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, color in (("a.png", 10), ("b.png", 90), ("copy_of_a.png", 10), ("c.png", 200)):
        PIL.Image.new("RGB", (64, 64), (color, 0, 0)).save(tmp_path / name)
    train = [
        chat("what?", "red", "a.png"),
        chat("what?", "blue", "b.png"),
        chat("what?", "yes", system="Be short."),
        chat("what?", "red", "a.png"),
    ]
    held_out = [chat("what?", "red", "copy_of_a.png"), chat("what?", "no", "c.png"), chat("what?", "maybe")]
    sections = {
        "model": {"path": str(TINY)},
        "data": {
            "train": str(write_jsonl(tmp_path / "train.jsonl", train)),
            "eval": str(write_jsonl(tmp_path / "eval.jsonl", held_out)),
        },
        "run": {"output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(sections))
    return path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["inspect-data", *words])


def test_what_train_and_eval_share_is_counted(config: Path) -> None:
    done = run(str(config), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    folder = config.parent
    assert found["overlap"] == {
        "num_train_images": 2,
        "num_eval_images": 2,
        "num_shared_images": 1,
        "num_shared_samples": 1,
        "shared_samples": [[f"{folder}/eval.jsonl:1", f"{folder}/train.jsonl:1"]],
        "image_share": 0.5,
    }
    train = found["splits"]["train"]
    assert train["roles"] == {"system": 1, "user": 4, "assistant": 4}
    assert train["shapes"] == {"messages": 3, "openai": 1}
    assert (train["num_samples"], train["num_images"], train["num_duplicates"]) == (4, 3, 1)


def test_the_lines_report_the_overlap(config: Path) -> None:
    lines = run(str(config)).output.splitlines()
    assert "Images in both: 1 of 2 in the training data (50.0%) and 2 in the evaluation data" in lines
    assert "Evaluation samples that are also trained on: 1" in lines
    assert "Turns: user (4), assistant (4), system (1)" in lines


def test_without_evaluation_data_it_says_how_to_hold_some_out(config: Path) -> None:
    assert "data.eval: {from: train, share: 0.05}" in run(str(config), "data.eval=[]").output


def test_the_page_has_the_figures_and_no_script(config: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat("what?", "red"), {"messages": HOSTILE}, {HOSTILE: 1}])
    page = tmp_path / "page.html"
    done = run(str(config), f"data.train={bad}", "--html", str(page))
    assert done.exit_code == 1  # there are faults
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "Images in both: 0 of 0" in text
    assert 'aria-label="Lengths of samples"' in text


def test_a_page_that_cannot_be_written_is_refused_before_the_work(config: Path, tmp_path: Path) -> None:
    done = run(str(config), "--html", str(tmp_path / "none" / "page.html"))
    assert "there is no folder" in str(done.exception)
