"""Questions with their references, and the metric that scores the answers to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtrain.answers.metrics import METRICS, find_metric
from mmtrain.errors import UserError
from mmtrain.generate.questions import Question
from mmtrain.records.reasoning import reply_of
from mmtrain.safe_text import shown


@dataclass(frozen=True, slots=True)
class ScoredQuestion:
    """One question with its reference, and how its answers are scored."""

    sample: int
    """The index of its sample."""
    source: str
    text: str
    reference: str
    metric: str
    """The metric of its source."""


def choose_metrics(
    questions: Sequence[Question], sources: Sequence[str], configured: Mapping[str, str | None]
) -> tuple[list[ScoredQuestion], dict[str, str]]:
    """The questions with the metrics of their sources, and for each source why it has its metric.

    `sources`: the source of each question; `configured`: the metric of each source, None where it is to be found from
    the references.
    """
    references = [reply_of(question.reference or "") for question in questions]
    chosen, reasons = {}, {}
    for name, metric in configured.items():
        own = [reference for reference, source in zip(references, sources, strict=True) if source == name]
        if own:
            chosen[name], reasons[name] = find_metric(own) if metric is None else (metric, "as configured")
    scored = [
        ScoredQuestion(question.sample, name, question.text, reference, chosen[name])
        for question, name, reference in zip(questions, sources, references, strict=True)
    ]
    return scored, reasons


def check_forms(questions: Sequence[ScoredQuestion], places: Sequence[str]) -> None:
    """Raises UserError with every reference that its metric cannot compare."""
    faults = []
    for question, place in zip(questions, places, strict=True):
        is_of_form = METRICS[question.metric].is_of_form
        if is_of_form is not None and not is_of_form(question.reference):
            faults.append(
                f"{place}: {question.metric} cannot compare {shown(question.reference)}: "
                "set another `metric` for the source"
            )
    if faults:
        raise UserError(faults)
