"""How well an answer of a given form agrees with a reference of that form: a letter, JSON, a box. 0 where the answer is
not of the form."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mmtrain.answers.normalize import as_written

_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_FIRST = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])[.):])(?:\s|$)")
_ANNOUNCED = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)[(\[]?([A-Z])(?![A-Za-z])")
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
    rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]|[\[(]{_NUMBER},{_NUMBER}[\])]\s*,?\s*[\[(]{_NUMBER},{_NUMBER}[\])]"
)
FieldPath = tuple[str | int, ...]
"""The keys and indices that lead to a value of JSON."""
Box = tuple[float, float, float, float]


def choice_letter(text: str) -> str | None:
    """The letter, in upper case, that a text chooses: `B`, `(B)`, `B. a dog`, `The answer is B`; None where none.

    `A cat` chooses nothing: a letter without a mark after it counts only alone or where it is announced.
    """
    plain = as_written(text)
    match = _ALONE.fullmatch(plain) or _FIRST.match(plain) or _ANNOUNCED.search(plain)
    return None if match is None else next(letter for letter in match.groups() if letter).upper()


def is_choice(text: str) -> bool:
    """Whether a reference is an option's letter and nothing else."""
    return _ALONE.fullmatch(as_written(text)) is not None


def multiple_choice(answer: str, reference: str) -> float:
    """1 where both texts choose the same letter."""
    letter = choice_letter(reference)
    return float(letter is not None and choice_letter(answer) == letter)


def parsed_json(text: str) -> Any:
    """The object or list that `text` is as JSON, also in a fenced block; None where it is none."""
    fenced = _FENCED.search(text)
    try:
        value = json.loads(text if fenced is None else fenced[1])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def json_accuracy(answer: str, reference: str) -> float:
    """The share of the fields of either text that are in both with the same value.

    A field is a value that is neither an object nor a list, by its path. Texts are equal as written, numbers by value.
    An answer that says everything and more is not perfect: what it adds counts as wrong.
    """
    given, wanted = json_fields(answer), json_fields(reference)
    if not given or not wanted:
        return 0.0
    num_equal = sum(bool(path in given and given[path] == value) for path, value in wanted.items())
    return num_equal / len(given.keys() | wanted.keys())


def json_fields(text: str) -> dict[FieldPath, Any]:
    """The value of each field of a text, comparable with `==`, by its path; empty where the text is not JSON."""
    value = parsed_json(text)
    return {} if value is None else dict(_fields(value))


def _fields(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Each field's path and value; an object or list without any is a field itself."""
    items: Iterable[Any] = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    inner = [field for key, one in items for field in _fields(one, (*path, key))]
    yield from inner
    if not inner:
        yield path, as_written(value) if isinstance(value, str) else (type(value) is bool, value)


def box(text: str) -> Box | None:
    """The one box (x1, y1, x2, y2) in a text, as `[x1, y1, x2, y2]` or `(x1, y1), (x2, y2)`; None where there is none
    or there are several."""
    found = list(_BOX.finditer(text))
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = (float(value) for value in found[0].groups() if value is not None)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def box_iou(answer: str, reference: str) -> float:
    """The area of the intersection of the two boxes over that of their union (Everingham and others, The PASCAL Visual
    Object Classes Challenge, 2010, section 4.2)."""
    given, wanted = box(answer), box(reference)
    if given is None or wanted is None:
        return 0.0
    width = min(given[2], wanted[2]) - max(given[0], wanted[0])
    height = min(given[3], wanted[3]) - max(given[1], wanted[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (_area(given) + _area(wanted) - common)


def box_accuracy(answer: str, reference: str) -> float:
    """1 where the boxes' intersection over union is at least 0.5."""
    return float(box_iou(answer, reference) >= 0.5)


def _area(one: Box) -> float:
    return (one[2] - one[0]) * (one[3] - one[1])
