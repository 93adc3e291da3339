"""How well an answer agrees with a reference as text: each score is from 0 to 1."""

import math
from collections import Counter

from mmtrain.answers.normalize import as_written, squad_tokens, vqa_normalized

_ANLS_THRESHOLD = 0.5
_RELAXED = 0.05
_CHRF_ORDER, _CHRF_BETA = 6, 2


def exact_match(answer: str, reference: str) -> float:
    """1 where the two are equal as written: after NFC, with runs of white space as one space."""
    return float(as_written(answer) == as_written(reference))


def vqa_match(answer: str, reference: str) -> float:
    """1 where the two are equal after the normalization of the VQA evaluation (see `vqa_normalized`).

    With one reference this is that evaluation's min(number of equal references / 3, 1) without the division.
    """
    return float(vqa_normalized(answer) == vqa_normalized(reference))


def anls(answer: str, reference: str) -> float:
    """1 - d / the longer one's length, d the Levenshtein distance in characters; 0 where that is below 0.5.

    Biten and others, Scene Text Visual Question Answering, 2019, section 4.2; without regard to case, as in DocVQA. At
    exactly 0.5 the paper's formula gives 0 and the evaluation scripts of ST-VQA and DocVQA give 0.5, as here.
    """
    one, other = as_written(answer).lower(), as_written(reference).lower()
    longer = max(len(one), len(other))
    share = levenshtein(one, other) / longer if longer else 0.0
    return 1.0 - share if 1.0 - share >= _ANLS_THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that turn `one` into `other` (Levenshtein, 1966)."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (left != right)))
        above = current
    return above[-1]


def parsed_number(text: str) -> float | None:
    """The number that `text` is, None where it is none. Commas between thousands and a currency sign are left out;
    a per cent sign divides by 100."""
    plain = as_written(text).replace(",", "").lstrip("$€£¥").removesuffix(".")
    is_share = plain.endswith("%")
    try:
        value = float(plain.removesuffix("%"))
    except ValueError:
        return None
    return (value / 100 if is_share else value) if math.isfinite(value) else None


def relaxed_accuracy(answer: str, reference: str) -> float:
    """1 where two numbers differ by at most 5 % of the reference, or two texts are equal without regard to case.

    Masry and others, ChartQA, 2022, section 5.1. A reference of zero is met by zero alone. Years are numbers like any
    others, so 2010 meets 2012: for years choose `exact_match`.
    """
    given, wanted = parsed_number(answer), parsed_number(reference)
    if given is None or wanted is None:
        return float(as_written(answer).lower() == as_written(reference).lower())
    # a hair of rounding: 105 is within 5 % of 100
    return float(abs(given - wanted) <= _RELAXED * abs(wanted) * (1 + 1e-12))


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it occurs.

    Rajpurkar and others, SQuAD, 2016, section 6.1. Two texts without words agree.
    """
    given, wanted = Counter(squad_tokens(answer)), Counter(squad_tokens(reference))
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total())


def chrf(answer: str, reference: str) -> float:
    """F with beta 2 over n-grams of 1 to 6 characters, without white space.

    Popović, chrF, 2015; precision and recall are averaged over the lengths of n-gram that both texts have, as sacrebleu
    does for one sentence.
    """
    given, wanted = ("".join(as_written(text).split()) for text in (answer, reference))
    precision = recall = 0.0
    orders = range(1, min(_CHRF_ORDER, len(given), len(wanted)) + 1)
    for order in orders:
        one, other = _ngrams(given, order), _ngrams(wanted, order)
        common = (one & other).total()
        precision += common / one.total() / len(orders)
        recall += common / other.total() / len(orders)
    weight = _CHRF_BETA**2
    if not precision + recall:
        return float(given == wanted)
    return (1 + weight) * precision * recall / (weight * precision + recall)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
