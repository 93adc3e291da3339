"""The best answers that can be given without looking at the images: for each question the one that scores best."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from mmtrain.answers.metrics import Score
from mmtrain.answers.normalize import as_written

_NUM_CANDIDATES = 10


def best_blind_answers(questions: Sequence[Hashable], references: Sequence[str], score: Score) -> list[str]:
    """For each reference the answer that a blind guess gives to its question.

    It is chosen with the references in sight, so no blind guess does better: of the 10 most frequent references of the
    question the one with the highest mean score, which for `exact_match` is the most frequent one; of equal ones the
    first. Questions that are asked only once are taken together as one: alone, each would be answered by its own
    reference.
    """
    asked = Counter(questions)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[(question,) if asked[question] > 1 else None].append(index)
    found = [""] * len(references)
    for indices in groups.values():
        best = _best([as_written(references[index]) for index in indices], score)
        for index in indices:
            found[index] = best
    return found


def _best(references: Sequence[str], score: Score) -> str:
    """The candidate with the highest sum of scores over `references`."""
    counts = Counter(references)
    candidates = [text for text, _ in counts.most_common(_NUM_CANDIDATES)]
    return max(candidates, key=lambda text: sum(count * score(text, other) for other, count in counts.items()))
