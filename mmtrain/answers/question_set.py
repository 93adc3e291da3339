"""The questions of evaluation samples with their references and metrics, and a model's replies to them."""

from collections.abc import Mapping, Sequence

from mmtrain.answers.scored_questions import check_forms, choose_metrics
from mmtrain.dataset.batch import Samples
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.generate.prompts import prompts_of
from mmtrain.generate.questions import Question, questions_of
from mmtrain.generate.replies import Generator, Reply
from mmtrain.generate.sampling import Sampling
from mmtrain.records.chat import refused_at

Replies = dict[int, Reply]
"""By the position of the question."""
_LEAST_NEW_TOKENS, _MOST_NEW_TOKENS = 16, 1024


class QuestionSet:
    """The questions of the samples `indices`, each trained reply being the reference of one."""

    def __init__(
        self,
        samples: StoredSamples,
        checked: CheckedSamples,
        encoder: Encoder,
        indices: Sequence[int],
        names: Sequence[str],
        metrics: Mapping[str, str | None],
    ) -> None:
        """`names`: of the sources of `samples`, in order; `metrics`: by name, None where one is to be found.

        Raises UserError where a reference is not of the form that the metric of its source compares.
        """
        records = samples.records
        self.samples = samples
        self._questions: list[Question] = []
        for index in indices:
            conversation = records.conversation(index)
            self._questions += questions_of(conversation, index, encoder.trained_turns(conversation.messages))
        of_source = [names[records.source(question.sample)] for question in self._questions]
        self.questions, self.reasons = choose_metrics(self._questions, of_source, metrics)
        self.places = [str(samples.place(question.sample)) for question in self._questions]
        check_forms(self.questions, self.places)
        longest = max(int(checked.num_supervised[index]) for index in indices)
        self.max_new_tokens = min(max(2 * longest, _LEAST_NEW_TOKENS), _MOST_NEW_TOKENS)
        """Twice what the longest reference needs: a longer answer is wrong whatever follows."""

    def replies(
        self,
        generator: Generator,
        numbers: Sequence[int],
        max_new_tokens: int | None = None,
        samples: Samples | None = None,
    ) -> list[Reply]:
        """The greedy replies to the questions `numbers`, in one batch. `max_new_tokens`: without it the set's own, or
        fewer where the model has no positions for them. `samples`: the same with other images.

        Raises UserError naming the place where a sample has changed meanwhile.
        """
        prompts = self.prompts(numbers, samples)
        limit = max_new_tokens or min(self.max_new_tokens, generator.room_after(prompts))
        with refused_at(f"{self.places[numbers[0]]} and the samples after it"):
            return generator.replies(prompts, Sampling(limit))

    def prompts(self, numbers: Sequence[int], samples: Samples | None = None) -> list[Encoded]:
        """Those of the questions `numbers`. Raises UserError as above."""
        asked = [self._questions[number] for number in numbers]
        inputs = self.samples if samples is None else samples
        with refused_at(f"{self.places[numbers[0]]} and the samples after it"):
            return [prompts_of(inputs.encoded(question.sample))[question.prompt] for question in asked]
