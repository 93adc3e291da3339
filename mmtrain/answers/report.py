"""The figures of `eval answers` for a person, in 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.safe_text import counted, shortened, visible
from mmtrain.scoring.results import figure_table, say

KINDS = {
    "model": "the model",
    "blind": "best blind answer",
    "swapped": "with swapped images",
    "no_images": "without images",
    "base": "the base model",
}
NO_TEXT = "(no text)"
"""Shown in the place of an empty answer."""
_NUM_SHOWN, _NUM_ROWS = 5, 40


def print_report(row: Mapping[str, Any], console: Console) -> None:
    """Prints what `row`, made by `figures`, has."""
    for name, source in row["sources"].items():
        say(
            f"{visible(name)}: {source['metric']} ({source['reason']}), {counted(source['num_answers'], 'answer')}",
            console,
        )
        console.print(_source_table(source))
        if source["num_of_other_form"]:
            say(f"Answers not of the metric's form, which count as wrong: {source['num_of_other_form']:,}", console)
        console.print()
    if row["questions"]:
        console.print(_question_table(row))
        console.print()
    if row["references"]:
        console.print(_reference_table(row))
        for line in reference_lines(row):
            say(line, console)
        console.print()
    if row["fields"]:
        console.print(_field_table(row))
        console.print()
    for key, title in (("worst", "Worst answers"), ("surprising", "Wrong answers that the model is most sure of")):
        if row[key]:
            say(f"{title}:", console)
        for example in row[key][:_NUM_SHOWN]:
            say(f"  {_example(example)}", console)
    for line in summary_lines(row):
        console.print(Text(line))


def summary_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """The last lines: what all figures together say."""
    metrics, blind = row["metrics"], row["blind"]
    yield (
        f"Exact match {metrics['exact_match']:.1%}, best blind answer {blind['exact_match']:.1%}; normalized by the "
        f"rules of VQA {metrics['vqa_match']:.1%} and {blind['vqa_match']:.1%}."
    )
    if row["num_incomplete"]:
        yield f"Answers cut off by --max-new-tokens: {row['num_incomplete']:,}."
    yield f"The model {row['verdict']}."


def _source_table(source: Mapping[str, Any]) -> Table:
    table = figure_table("", "score", "95 %")
    for kind, name in KINDS.items():
        if kind in source["means"]:
            low, high = source["intervals"][kind]
            table.add_row(name, f"{source['means'][kind]:.1%}", f"{low:.1%} to {high:.1%}")
    return table


def _question_table(row: Mapping[str, Any]) -> Table:
    table = figure_table("question", "answers", "model", "blind", "best blind answer")
    for one in row["questions"]:
        figures = [f"{one['num_answers']:,}", f"{one['model']:.1%}", f"{one['blind']:.1%}"]
        table.add_row(Text(_short(one["question"], 40)), *figures, Text(_short(one["blind_answer"], 20)))
    return table


def reference_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """For each source the mean over its references, where a rare one counts as much as a frequent one."""
    for name in row["sources"]:
        scores = [one["score"] for one in row["references"] if one["source"] == name]
        if scores:
            yield f"{visible(name)}: mean over {len(scores):,} references {sum(scores) / len(scores):.1%}"


def _reference_table(row: Mapping[str, Any]) -> Table:
    table = figure_table("reference", "answers", "score", "most frequent wrong answer")
    for one in row["references"][:_NUM_ROWS]:
        wrong = "" if one["wrong_answer"] is None else f"{_short(one['wrong_answer'], 24) or NO_TEXT}"
        wrong += f" ({one['num_wrong_answer']:,})" if wrong else ""
        table.add_row(Text(_short(one["reference"], 30)), f"{one['num_answers']:,}", f"{one['score']:.1%}", Text(wrong))
    return table


def _field_table(row: Mapping[str, Any]) -> Table:
    table = figure_table("field", "references", "equal", "only in the answer")
    for one in row["fields"][:_NUM_ROWS]:
        share = "–" if one["score"] is None else f"{one['score']:.1%}"
        table.add_row(Text(_short(one["field"], 40)), f"{one['num_references']:,}", share, f"{one['num_added']:,}")
    return table


def _example(example: Mapping[str, Any]) -> str:
    sure = "" if example["probability"] is None else f", {example['probability']:.0%} sure"
    answer = _short(example["answer"], 60) or NO_TEXT
    return (
        f"{visible(example['place'])}  {_short(example['question'], 60)}  →  {answer}  "
        f"(reference: {_short(example['reference'], 60)}; score {example['score']:.2f}{sure})"
    )


def _short(text: str, limit: int) -> str:
    return visible(shortened(text, limit))
