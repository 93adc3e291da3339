"""The evaluation sets of a run: every sample to be scored, and a few whose questions are asked during the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.answers.question_set import QuestionSet
from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.dataset.plan import permutation
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.encoding.encode import Encoder
from mmtrain.errors import UserError
from mmtrain.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One source of `data.eval`, checked and ready to be scored."""

    name: str
    samples: StoredSamples
    checked: CheckedSamples
    scorer: Scorer
    questions: QuestionSet | None
    """What is asked during the run; None without `run.eval_answers`."""


def eval_sources(config: Config) -> dict[str, EvalSource]:
    """By name. Raises UserError where two have the same."""
    found = {source.title: source for source in config.data.eval}
    if len(found) < len(config.data.eval):
        raise UserError("data.eval: two sources have the same name: give each its own `name`")
    return found


def make_eval_sets(
    config: Config, encoder: Encoder, checked: Sequence[tuple[StoredSamples, CheckedSamples]]
) -> list[EvalSet]:
    """`checked`: the samples of each source. Raises UserError where the metric of a source cannot compare a
    reference."""
    answers, found = config.run.eval_answers, []
    sizes = [len(one.used) for _, one in checked]
    numbers = [0] * len(sizes) if answers is None else spread(answers.samples, sizes)
    for position, (name, source) in enumerate(eval_sources(config).items()):
        samples, own = checked[position]
        scorer = Scorer(samples, encoder, own.used, own.num_tokens[own.used].tolist())
        chosen = own.used[permutation(len(own.used), config.train.seed, 0, position + 1)[: numbers[position]]]
        questions = None
        if len(chosen):
            questions = QuestionSet(
                samples,
                own,
                encoder,
                sorted(chosen.tolist()),
                [name] * samples.records.num_sources,
                {name: source.metric},
            )
        found.append(EvalSet(name, samples, own, scorer, questions))
    return found


def spread(number: int, sizes: Sequence[int]) -> list[int]:
    """How many samples each set gives to `number`: as many as the others, except that a small set gives all it has,
    and every set at least one."""
    found, left = [0] * len(sizes), number
    smallest_first = sorted(range(len(sizes)), key=lambda position: sizes[position])
    for rank, position in enumerate(smallest_first):
        found[position] = min(sizes[position], max(1, left // (len(sizes) - rank)))
        left -= found[position]
    return found
