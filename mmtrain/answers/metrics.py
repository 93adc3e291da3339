"""The metrics by name, and which of them suits the references of a source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmtrain.answers.normalize import as_written
from mmtrain.answers.structured_metrics import (
    box,
    box_accuracy,
    box_iou,
    choice_letter,
    is_choice,
    json_accuracy,
    multiple_choice,
    parsed_json,
)
from mmtrain.answers.text_metrics import anls, chrf, exact_match, parsed_number, relaxed_accuracy, token_f1, vqa_match

Score = Callable[[str, str], float]
"""(answer, reference) → 0 to 1."""
_SHORT_WORDS, _SHORT_CHARACTERS = 5, 40


@dataclass(frozen=True, slots=True)
class Metric:
    """`is_of_form`: whether a text is of the form that the metric compares, such as a box; None: any text is."""

    name: str
    score: Score
    is_of_form: Callable[[str], bool] | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("vqa_match", vqa_match),
        Metric("anls", anls),
        Metric("relaxed_accuracy", relaxed_accuracy),
        Metric("multiple_choice", multiple_choice, lambda text: choice_letter(text) is not None),
        Metric("token_f1", token_f1),
        Metric("chrf", chrf),
        Metric("json_accuracy", json_accuracy, lambda text: parsed_json(text) is not None),
        Metric("box_iou", box_iou, lambda text: box(text) is not None),
        Metric("box_accuracy", box_accuracy, lambda text: box(text) is not None),
    )
}


def find_metric(references: Sequence[str]) -> tuple[str, str]:
    """The name of the metric that suits `references` (at least one), and what it was chosen for, in words.

    Whole numbers are compared exactly: with 5 % of tolerance one year passes for another.
    """
    if all(box(text) is not None for text in references):
        return "box_iou", "every reference is a box"
    if all(parsed_json(text) is not None for text in references):
        return "json_accuracy", "every reference is JSON"
    if all(is_choice(text) for text in references):
        return "multiple_choice", "every reference is the letter of an option"
    numbers = [parsed_number(text) for text in references]
    if None not in numbers and not all(value is not None and value.is_integer() for value in numbers):
        return "relaxed_accuracy", "every reference is a number, and some are not whole"
    if sum(_is_short(text) for text in references) * 2 >= len(references):
        return "exact_match", f"most references have at most {_SHORT_WORDS} words"
    return "chrf", f"most references have more than {_SHORT_WORDS} words"


def _is_short(text: str) -> bool:
    plain = as_written(text)
    return len(plain.split()) <= _SHORT_WORDS and len(plain) <= _SHORT_CHARACTERS
