"""Each metric against values worked out by hand, and those of the scripts of VQA and SQuAD and of sacrebleu."""

from collections.abc import Callable

import pytest

from mmtrain.answers.blind import best_blind_answers
from mmtrain.answers.metrics import METRICS, find_metric
from mmtrain.answers.normalize import squad_tokens, vqa_normalized
from mmtrain.answers.structured_metrics import (
    box_accuracy,
    box_iou,
    choice_letter,
    json_accuracy,
    multiple_choice,
)
from mmtrain.answers.text_metrics import (
    anls,
    chrf,
    exact_match,
    levenshtein,
    relaxed_accuracy,
    token_f1,
    vqa_match,
)

Score = Callable[[str, str], float]
CASES: list[tuple[Score, str, str, float]] = [
    (exact_match, "a cat", "a cat", 1),
    (exact_match, " a\n cat ", "a cat", 1),
    (exact_match, "cafe\u0301", "caf\u00e9", 1),
    (exact_match, "A cat", "a cat", 0),
    (exact_match, "a cat.", "a cat", 0),
    (vqa_match, "A Cat.", "cat", 1),
    (vqa_match, "two", "2", 1),
    (vqa_match, "1,000", "1000", 1),
    (vqa_match, "dont know", "don't know", 1),
    (vqa_match, "cat", "dog", 0),
    (anls, "kitten", "Sitten", 1 - 1 / 6),
    (anls, "kitten", "sitting", 1 - 3 / 7),
    (anls, "abcd", "abxy", 0.5),  # half of it differs
    (anls, "abcde", "abxyz", 0),
    (anls, "", "", 1),
    (anls, "", "abc", 0),
    (relaxed_accuracy, "105", "100", 1),
    (relaxed_accuracy, "95", "100", 1),
    (relaxed_accuracy, "105.1", "100", 0),
    (relaxed_accuracy, "94.9", "100", 0),
    (relaxed_accuracy, "-95", "-100", 1),
    (relaxed_accuracy, "5%", "0.05", 1),
    (relaxed_accuracy, "5%", "5", 0),
    (relaxed_accuracy, "$1,020", "1000", 1),
    (relaxed_accuracy, "0.0", "0", 1),
    (relaxed_accuracy, "0.01", "0", 0),
    (relaxed_accuracy, "2010", "2012", 1),  # as the paper has it
    (relaxed_accuracy, "Yes", "yes", 1),
    (relaxed_accuracy, "5", "five", 0),
    (relaxed_accuracy, "inf", "3", 0),
    (multiple_choice, "(b)", "B", 1),
    (multiple_choice, "B. a dog", "B", 1),
    (multiple_choice, "The answer is C", "C", 1),
    (multiple_choice, "A cat", "A", 0),
    (multiple_choice, "I do not know", "I", 0),
    (multiple_choice, "cat", "dog", 0),
    (token_f1, "the black cat", "a cat sits", 2 / 4),  # one word in common, two in each
    (token_f1, "cat cat dog", "cat dog dog", 2 * 2 / 6),
    (token_f1, "The cat!", "cat", 1),
    (token_f1, "dog", "cat", 0),
    (token_f1, "", "the", 1),
    (token_f1, "", "cat", 0),
    # precision 1, recall of letters 2/3, of pairs 1/2
    (chrf, "ab", "abc", 5 * 1 * (7 / 12) / (4 * 1 + 7 / 12)),
    (chrf, "a b", "ab", 1),
    (chrf, "a", "b", 0),
    (chrf, "", "", 1),
    (chrf, "", "a", 0),
    (json_accuracy, '{"a": 1, "b": "x"}', '{"a": 1, "b": "x"}', 1),
    (json_accuracy, '{"a": 1.0, "b": "y"}', '{"a": 1, "b": "x"}', 0.5),
    (json_accuracy, '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 2 / 3),
    (json_accuracy, '{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
    (json_accuracy, '{"a": 1}', '{"a": true}', 0),
    (json_accuracy, '{"a": "1"}', '{"a": 1}', 0),
    (json_accuracy, '```json\n{"a": 1}\n```', '{"a": 1}', 1),
    (json_accuracy, '{"a": 1', '{"a": 1}', 0),
    (json_accuracy, "{}", "{}", 1),
    (json_accuracy, "{}", '{"a": 1}', 0),
    (box_iou, "[0, 0, 2, 2]", "[1, 1, 3, 3]", 1 / 7),
    (box_iou, "(0, 0), (2, 2)", "[0, 0, 2, 2]", 1),
    (box_iou, "<|box_start|>(0,0),(4,2)<|box_end|>", "[0, 0, 2, 2]", 0.5),
    (box_iou, "[5, 5, 6, 6]", "[0, 0, 2, 2]", 0),
    (box_iou, "[2, 2, 0, 0]", "[0, 0, 2, 2]", 0),
    (box_iou, "no box", "[0, 0, 2, 2]", 0),
    (box_iou, "[0, 0, 2, 2] or [1, 1, 3, 3]", "[0, 0, 2, 2]", 0),
    (box_accuracy, "[0, 0, 4, 2]", "[0, 0, 2, 2]", 1),
    (box_accuracy, "[0, 0, 5, 2]", "[0, 0, 2, 2]", 0),
]


@pytest.mark.parametrize(("score", "answer", "reference", "expected"), CASES)
def test_a_metric_gives_what_is_worked_out_by_hand(score: Score, answer: str, reference: str, expected: float) -> None:
    assert score(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_every_metric_is_worked_out_by_hand() -> None:
    assert {metric.score for metric in METRICS.values()} == {score for score, *_ in CASES}


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.645779420625287),
        ("ab", "abc", 0.6363636363636362),
        ("一只黑猫", "一只白猫", 0.2708333333333333),
        ("A dog runs.", "A cat sleeps on the sofa.", 0.04681647940074906),
    ],
)
def test_chrf_is_sacrebleus(answer: str, reference: str, expected: float) -> None:
    """`CHRF().sentence_score(answer, [reference]).score / 100` of sacrebleu 2.6."""
    assert chrf(answer, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's ears.", "cat's ears"),
        ("Well-known/old", "well known old"),  # no space next to the marks: a space for each
        ("red , blue", "red blue"),
        ("1,000 - 2,500", "1000 2500"),
        ("3.5 meters.", "3.5 meters"),
        ("None", "0"),
        ("ten", "10"),
        ("a an the", ""),
        ("shouldnt've", "shouldn't've"),
        ("What? No!", "what no"),
        ("10:30", "10:30"),
    ],
)
def test_vqa_normalization(text: str, expected: str) -> None:
    assert vqa_normalized(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S. dont, 1,000 a.m.", "us don't 1000 am"),
        ("red-blue [y] no!  $5", "red blue y no $5"),
        ("Thats 10:30, isnt it?", "that's 10:30 isn't it"),
        ("yall'd've seen (three) of them.", "y'all'd've seen 3 of them"),
        ("hed lets ive wouldntve", "he'd lets ive wouldntve"),
        ("x/y; {z}=2.50", "x y z 2.50"),
        ("None of the two.", "0 of 2"),
        ("somebodys on 5% of it -", "somebody's on 5% of it"),
        ("well , whos 3 .5", "well who's 3 .5"),
    ],
)
def test_vqa_normalization_is_that_of_the_authors_script(text: str, expected: str) -> None:
    """What `processPunctuation` and `processDigitArticle` of vqaEval.py give (github.com/GT-Vision-Lab/VQA)."""
    assert vqa_normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The U.S. President, an old man", "the old man of the US", 0.75),
        ("It's 5 o'clock", "its five oclock", 2 / 3),
        ("a-b c", "ab c d d", 2 / 3),
        ("no no no", "no yes no", 2 / 3),
    ],
)
def test_token_f1_is_that_of_squads_script(answer: str, reference: str, expected: float) -> None:
    """`f1_score` of the evaluation script of SQuAD 1.1."""
    assert token_f1(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_squad_tokens_lose_case_punctuation_and_articles() -> None:
    assert squad_tokens("The U.S. President, an old man") == ["us", "president", "old", "man"]


@pytest.mark.parametrize(("one", "other", "num"), [("", "", 0), ("", "ab", 2), ("flaw", "lawn", 2), ("ab", "ba", 2)])
def test_the_edit_distance_is_that_worked_out_by_hand(one: str, other: str, num: int) -> None:
    assert levenshtein(one, other) == levenshtein(other, one) == num


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("b", "B"),
        ("[C]", "C"),
        ("D)", "D"),
        ("(A) red", "A"),
        ("Answer: D", "D"),
        ("the correct option is (B) because", "B"),
        ("A red circle", None),
        ("The answer is Apples", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("references", "metric"),
    [
        (["[1, 2, 3, 4]", "(1, 2), (3, 4)"], "box_iou"),
        (['{"a": 1}', "[]"], "json_accuracy"),
        (["A", "(B)", "c."], "multiple_choice"),
        (["1.5", "3", "$2,000"], "relaxed_accuracy"),
        (["2010", "2012"], "exact_match"),
        (["a red circle", "blue"], "exact_match"),
        (["a red circle", "[1, 2, 3, 4]"], "exact_match"),
        (["one of the many things that there are", "a cat and a dog on a sofa"], "chrf"),
    ],
)
def test_the_metric_is_found_from_the_references(references: list[str], metric: str) -> None:
    assert find_metric(references)[0] == metric


def test_the_blind_answer_is_the_most_frequent_reference_of_each_question() -> None:
    questions = ["colour?", "shape?", "colour?", "shape?", "colour?", "shape?"]
    references = ["red", "circle", "blue", "square", "blue", "circle"]
    assert best_blind_answers(questions, references, exact_match) == ["blue", "circle"] * 3


def test_questions_that_are_asked_once_share_a_blind_answer() -> None:
    """Each answered by its own reference, a blind guess would be right every time."""
    assert best_blind_answers(["1?", "2?", "3?"], ["no", "yes", "yes"], exact_match) == ["yes"] * 3


def test_the_blind_answer_is_the_best_one_for_the_metric() -> None:
    """Two boxes far apart are each as frequent as the one that meets both."""
    references = ["[0, 0, 2, 2]", "[1, 0, 3, 2]", "[2, 0, 4, 2]"]
    assert best_blind_answers(["where?"] * 3, references, box_iou) == ["[1, 0, 3, 2]"] * 3
