"""`mmtrain inspect-labels` of pairs: the matrix shows what the loss compares, and the audit finds what is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.errors import UserError
from support.tower_models import LENGTH, make_clip

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        PIL.Image.new("RGB", (40, 32), colour).save(tmp_path / f"{colour}.png")


def write(name: str, records: Sequence[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return name


def run(model: Path, *words: str, train: str = "train.jsonl", **data: Any) -> Any:
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "tune": {"vision": {"mode": "full"}},
        "data": {"train": [{"path": train, **data.pop("source", {})}], **data},
        "objective": {"kind": "contrastive"},
        "train": {"batch_size": 4},
        "run": {"output_dir": "run", "device": "cpu"},
    }
    Path("config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return CliRunner().invoke(app, ["inspect-labels", "config.yaml", *words])


def pairs() -> list[dict[str, Any]]:
    """The first two share a text; the last two are of one group."""
    return [
        {"image": "red.png", "text": "warm", "shop": 1},
        {"image": "yellow.png", "text": ["warm", "bright"], "shop": 2},
        {"image": "green.png", "text": "a leaf", "shop": 3},
        {"image": "blue.png", "text": "a lake", "shop": 3},
    ]


def by_image(done: Any) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["query"]["images"][0]: row for row in rows}


def texts(items: Sequence[dict[str, Any]]) -> set[str]:
    return {item["text"] for item in items}


def test_every_query_has_its_positives_and_what_is_left_out(clip: Path) -> None:
    write("train.jsonl", pairs())
    found = by_image(run(clip, "--json", source={"group": "shop"}))
    expected = {
        "red.png": ({"warm"}, set(), 3),
        "yellow.png": ({"warm", "bright"}, set(), 2),
        "green.png": ({"a leaf"}, {"a lake"}, 2),
        "blue.png": ({"a lake"}, {"a leaf"}, 2),
    }
    seen = {name: (texts(row["positives"]), texts(row["neither"]), row["num_negatives"]) for name, row in found.items()}
    assert seen == expected
    (warm,) = found["red.png"]["positives"]
    assert sorted(warm["places"]) == ["train.jsonl:1", "train.jsonl:2"]


def test_the_terminal_shows_a_matrix_in_80_columns(clip: Path) -> None:
    write("train.jsonl", pairs())
    done = run(clip, source={"group": "shop"})
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "Step 1: 4 pairs, 4 distinct queries, 4 documents"
    assert lines[1] == "5 positives, 9 negatives, 2 neither"
    matrix = sorted(line.split()[1] for line in lines if line.startswith("Q") and "[" not in line)
    assert sorted("".join(matrix)) == sorted("+" * 5 + "·" * 9 + "=" * 2)
    assert all(len(line) <= 80 for line in lines)
    assert any("warm" in line and "(in 2 samples)" in line for line in lines)


def test_few_queries_of_many_are_shown(clip: Path) -> None:
    write("train.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(200)])
    done = run(clip, "--num", "2", "train.batch_size=200")
    lines = done.output.splitlines()
    assert lines[0] == "Step 1: 200 pairs, 200 distinct queries, 200 documents"
    assert "198 queries and 128 documents are not shown" in lines
    rows = [line.split()[1] for line in lines if line.startswith("Q") and len(line.split()) == 2 and "·" in line]
    assert [row.count("+") for row in rows] == [1, 1]
    assert all(len(line) <= 80 for line in lines)


def test_the_step_of_a_sample_is_shown_with_its_query_first(clip: Path) -> None:
    write("train.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(12)])
    for index in (0, 7, 11):
        rows = [json.loads(line) for line in run(clip, "--index", str(index), "--json").stdout.splitlines()]
        assert rows[0]["query"]["text"] == f"q{index}"
        assert len(rows) == 4
    assert "--index 12: no such pair" in str(run(clip, "--index", "12").exception)


def test_the_page_escapes_texts(clip: Path) -> None:
    write("train.jsonl", [*pairs()[:3], {"image": "blue.png", "text": "<script>alert(1)</script>", "shop": 4}])
    done = run(clip, "--html", "page.html", source={"group": "shop"})
    assert done.exit_code == 0, done.output
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count('class="positive"') == 5
    assert page.count("data:image/png;base64,") == 4


def test_the_eval_split(clip: Path) -> None:
    write("train.jsonl", pairs())
    write("eval.jsonl", [{"image": "red.png", "text": "a rose"}])
    (row,) = [
        json.loads(line)
        for line in run(
            clip, "--json", "--split", "eval", eval=["eval.jsonl"], source={"group": "shop"}
        ).stdout.splitlines()
    ]
    assert texts(row["positives"]) == {"a rose"}


@pytest.mark.parametrize("option", [["--tokens"], ["--losses"], ["--adapter", "run"]])
def test_options_of_chats_are_refused(clip: Path, option: list[str]) -> None:
    write("train.jsonl", [{"query": "q", "positive": "p"}])
    error = run(clip, *option).exception
    assert isinstance(error, UserError)
    assert str(error) == f"{option[0]}: it is for objective.kind: chat"


def faulty() -> list[dict[str, Any]]:
    return [
        {"image": "red.png", "text": "fine"},
        {"image": "none.png", "text": "missing"},
        {"image": "half.png", "text": "cut off"},
        {"image": "red.png", "text": "too long " * LENGTH},
        {"image": "red.png", "label": "unknown"},
    ]


def test_the_audit_names_every_fault_by_its_line(clip: Path) -> None:
    write("train.jsonl", faulty())
    whole = Path("red.png").read_bytes()
    middle = whole.index(b"IDAT") + 4
    Path("half.png").write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    done = run(clip, "--all", "--json")
    assert done.exit_code == 1
    row = json.loads(done.stdout)
    assert row["sources"] == [{"path": "train.jsonl", "num_pairs": 5, "num_used": 1, "num_faults": 4}]
    reasons = {fault["place"]: fault["reason"] for fault in row["faults"]}
    assert list(reasons) == [f"train.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert "No such file" in reasons["train.jsonl:2"]
    assert "does not decode" in reasons["train.jsonl:3"]
    assert f"over the {LENGTH} allowed" in reasons["train.jsonl:4"]
    assert "no known format of pairs" in reasons["train.jsonl:5"]
    report = run(clip, "--all").output
    assert "4 faults" in report
    assert all(f"{fault['place']}: {fault['reason']}" in report for fault in row["faults"])


def test_too_long_is_a_note_where_it_is_dropped(clip: Path) -> None:
    write("train.jsonl", [{"query": "a", "positive": "b"}, {"query": "c", "positive": "too long " * LENGTH}])
    done = run(clip, "--all", "--json", too_long="drop")
    assert done.exit_code == 0
    row = json.loads(done.stdout)
    assert row["faults"] == []
    assert row["notes"]["too long, dropped"] == {"count": 1, "places": ["train.jsonl:2"]}


def test_the_audit_notes_what_is_worth_a_look(clip: Path) -> None:
    write(
        "train.jsonl",
        [
            {"query": "a", "positive": "b"},
            {"query": "a", "positive": "b"},
            {"query": "same", "positive": "same"},
            {"query": "c", "positive": ["d", "e"], "negatives": ["e"]},
            {"query": "f", "positive": {"image": "red.png"}},
        ],
    )
    PIL.Image.open("red.png").save("copy.png")
    write("eval.jsonl", [{"query": "a", "positive": ["x", "b"]}, {"query": "g", "positive": {"image": "copy.png"}}])
    notes = json.loads(run(clip, "--all", "--json", "train.batch_size=5", eval=["eval.jsonl"]).stdout)["notes"]
    assert {kind: note["places"] for kind, note in notes.items()} == {
        "same as an earlier pair": ["train.jsonl:2"],
        "its query is its positive": ["train.jsonl:3"],
        "a negative is a positive": ["train.jsonl:4"],
        "the same pair is in data.eval": ["train.jsonl:1", "train.jsonl:2"],
        "an image is in data.eval too": ["train.jsonl:5"],
    }
    notes = json.loads(run(clip, "--all", "--json", "--split", "eval", eval=["eval.jsonl"]).stdout)["notes"]
    assert {kind: note["places"] for kind, note in notes.items()} == {
        "the same pair is in data.train": ["eval.jsonl:1"],
        "an image is in data.train too": ["eval.jsonl:2"],
    }


def test_a_pair_that_is_alone_in_its_step_is_noted(clip: Path) -> None:
    write("train.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(5)])
    row = json.loads(run(clip, "--all", "--json").stdout)  # 5 pairs in steps of 4: the last one is alone
    assert row["notes"]["no negative in its step"]["count"] == 1
    assert "no negative in its step: 1 pair," in run(clip, "--all").output
