"""scripts/component_study: the table from made-up scores with known results, and the whole study on a tiny model."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.builders import ROOT, mixed_rows, write_jsonl

sys.path.insert(0, str(ROOT / "scripts"))

from component_study import __main__ as command
from component_study.plot import draw
from component_study.table import markdown, rows_of, text
from component_study.trial import BASE, Setting


def result(nll: float, right: list[float], other: list[float], divergence: float, **costs: float) -> dict[str, Any]:
    """Scores of four samples with one answer of two tokens each; `nll` in nats per token."""
    scores = {"sample": [0, 1, 2, 3], "num_tokens": [2] * 4, "question_sample": [0, 1, 2, 3]}
    return {
        **costs,
        "eval": {**scores, "nll": [2 * nll] * 4, "divergence": [0.0] * 4, "right": right},
        "other": {**scores, "nll": [1.0] * 4, "divergence": [2 * divergence] * 4, "right": other},
    }


COSTS = {"num_trainable": 10.0, "tokens_per_second": 100.0}
VISION, LANGUAGE = ("vision",), ("language",)
SOME = [VISION, LANGUAGE, VISION + LANGUAGE]
RESULTS = {
    BASE: result(2.0, [0, 0, 0, 0], [1, 1, 1, 1], 0.0),
    Setting("lora", LANGUAGE, 0.1, 0): result(1.0, [1, 0, 0, 0], [1, 1, 1, 0], 0.25, **COSTS),
    Setting("lora", LANGUAGE, 0.2, 0): result(0.5, [1, 1, 0, 0], [1, 1, 0, 0], 0.5, **COSTS),
    Setting("lora", LANGUAGE, 0.2, 1): result(0.7, [1, 1, 0, 0], [0, 0, 0, 0], 0.7, **COSTS),
    Setting("lora", VISION, 0.1, 0): result(0.4, [1, 1, 1, 1], [1, 1, 1, 1], 0.1, **COSTS),
    Setting("lora", VISION, 0.2, 0): result(0.9, [0, 0, 0, 0], [1, 1, 1, 1], 0.1, **COSTS),
    Setting("lora", VISION, 0.1, 1): result(0.4, [0, 1, 1, 1], [1, 1, 1, 1], 0.1, **COSTS),
}


def test_the_table_by_hand() -> None:
    base, language, vision = rows_of(RESULTS)
    assert (base["components"], language["components"], vision["components"]) == ([], ["language"], ["vision"])
    assert (language["rate"], vision["rate"]) == (0.2, 0.1)  # by the loss of the first seed
    assert language["tried"] == {0.1: pytest.approx(1.0), 0.2: pytest.approx(0.5)}
    assert language["num_seeds"] == 2
    assert language["perplexity"] == pytest.approx([math.exp(0.6)] * 3)  # over both seeds; all samples are alike
    assert language["exact_match"][0] == 0.5
    assert vision["exact_match"][0] == pytest.approx(7 / 8)
    assert vision["exact_match_by_seed"] == [1.0, 0.75]
    assert vision["to_base"][0] == pytest.approx(7 / 8)
    assert vision["to_language"][0] == pytest.approx(3 / 8)  # 7/8 - 4/8, the same samples of both
    assert vision["to_sets"] == {"language": vision["to_language"]}
    assert language["to_sets"]["vision"][0] == pytest.approx(-3 / 8)
    assert base["to_sets"] == {}
    assert language["other_divergence"] == pytest.approx([0.6] * 3)
    assert language["other_exact_match"][0] == 0.25
    assert language["other_to_base"][0] == -0.75
    assert base["to_language"] is None
    assert base["other_divergence"][0] == 0


def test_the_table_as_text_markdown_and_plot() -> None:
    rows = rows_of(RESULTS)
    lines = text(rows).splitlines()
    assert len(lines) == 4
    assert re.search(r"^lora +vision +10 +0\.1 +1\.492 .* 87\.5 \(.*\) .*\+37\.5 \(", lines[3])
    table = markdown(rows).splitlines()
    assert len(table) == 5
    assert {line.count("|") for line in table} == {13}
    plot = draw(rows)
    assert plot.count("<circle") == 9  # three rows in three panels
    assert "lora: vision" in plot
    json.dumps(rows)


def test_every_set_of_components_is_trained() -> None:
    assert len({frozenset(subset) for subset in command.SUBSETS} - {frozenset()}) == len(command.SUBSETS) == 7


@pytest.mark.slow("trains a tiny model 6 times")
def test_the_whole_study_is_run_once(
    model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "mixed.jsonl", mixed_rows(tmp_path, with_images=True))
    other = write_jsonl(tmp_path / "other.jsonl", mixed_rows(tmp_path, with_images=True)[:3])
    config = {
        "model": {"path": str(model_dirs["llava"]), "dtype": "float32"},
        "data": {"train": str(data), "eval": [{"path": str(data)}]},
        "train": {"steps": 4, "batch_size": 4},
        "run": {"output_dir": "unused"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = [str(tmp_path / "c.yaml"), "--other", str(other), "--work", str(tmp_path / "work"), "--rates", "1e-2"]
    words += ["--seeds", "0", "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "p.svg")]
    monkeypatch.setattr(sys, "argv", ["component_study", *words])
    monkeypatch.setattr(command, "SUBSETS", SOME)
    command.main()
    rows = json.loads((tmp_path / "t.json").read_text())
    assert len(rows) == 1 + 2 * len(SOME)
    assert {(row["mode"], *row["components"]) for row in rows if row["mode"] != "none"} == {
        (mode, *subset) for mode in ("lora", "full") for subset in SOME
    }
    parts = {tuple(row["components"]): row["num_trainable"] for row in rows if row["mode"] == "full"}
    assert parts[VISION + LANGUAGE] == parts[VISION] + parts[LANGUAGE]
    assert all(row["other_divergence"][0] > 1e-6 for row in rows[1:])
    assert rows[0]["other_divergence"][0] == 0
    files = sorted((tmp_path / "work").glob("*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    command.main()  # nothing is done again
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "7 of 7 runs done" in capsys.readouterr().err
