"""Runs as one HTML page that needs no network and no script. All text is escaped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.atomic_files import write_text
from mmtrain.report.chart import short_number
from mmtrain.report.compare import differing_keys
from mmtrain.report.environment import page_template
from mmtrain.report.read import Row, RunRecord, read_run
from mmtrain.report.run_charts import charts, length_chart
from mmtrain.report.series import column, smoothed
from mmtrain.train.metrics import rows_of
from mmtrain.train.summary import duration

REPORT = "report.html"
NUM_ANSWERS = 12


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the page of `runs` to `path`. Raises UserError where one is no run, and OSError."""
    records = [read_run(run) for run in runs]
    page = page_template(__package__).render(
        runs=records,
        tiles=[_tiles(run) for run in records],
        charts=charts(records),
        differing=differing_keys([run.config for run in records]),
        answers=_answers(records[0]) if len(records) == 1 else [],
        length_chart=length_chart,
    )
    write_text(path, page, durable=False)


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """What a reader wants to know first: (title, figure)."""
    found = run.summary
    planned = run.facts.get("num_steps", found.num_steps)
    tiles = [
        ("steps", f"{found.num_steps:,}" + ("" if planned == found.num_steps else f" of {planned:,}")),
        ("training time", duration(found.seconds)),
        ("tokens", f"{found.num_tokens:,}"),
    ]
    _, losses = column(run.steps, "loss")
    if len(losses):
        averages = smoothed(losses)
        tiles.append(("loss", _change(losses[0], averages[-1])))
    tiles += [(f"perplexity, {one.name}", _change(one.first, one.last)) for one in found.evals]
    for way in found.retrieval:
        tiles.append((f"recall@1, {way.direction.replace('_', ' ')}, {way.name}", f"{way.first:.1%} → {way.last:.1%}"))
    for name, rows in run.answers.items():
        last = rows[-1]
        score, blind = last["metrics"].get(last["metric"]), last["blind"].get(last["metric"])
        if score is not None and blind is not None:
            tiles.append((f"{last['metric']}, {name}", f"{score:.1%} (blind {blind:.1%})"))
    return tiles


def _change(first: float, last: float) -> str:
    return f"{short_number(first)} → {short_number(last)}"


def _answers(run: RunRecord) -> list[dict[str, Any]]:
    """Some questions with the answers before the first step and after the last one."""
    files = sorted((run.path / "answers").glob("step-*.jsonl"))
    if len(files) < 2:
        return []
    first = {_question(row): row for row in rows_of(files[0])}
    last = [row for row in rows_of(files[-1]) if _question(row) in first]
    shown = last[:: max(1, len(last) // NUM_ANSWERS)][:NUM_ANSWERS]
    return [{**row, "before": first[_question(row)]["answer"]} for row in shown]


def _question(row: Row) -> str:
    return json.dumps([row["source"], row["place"], row["question"]])
