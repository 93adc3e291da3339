"""The evaluations of a run over chats: perplexity, and answers to some questions."""

from pathlib import Path

from mmtrain.config import Config
from mmtrain.generate.replies import ANY_LENGTH, Generator
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress
from mmtrain.train.dataset import Dataset
from mmtrain.train.eval_answers import AnswersEvaluation
from mmtrain.train.eval_perplexity import PerplexityEvaluation
from mmtrain.train.evaluations import Evaluation
from mmtrain.train.step import Learner


def make_evaluations(config: Config, dataset: Dataset, learner: Learner, progress: Progress) -> list[Evaluation]:
    """Those of a run, in order."""
    found: list[Evaluation] = [PerplexityEvaluation(config, one, learner, progress) for one in dataset.eval]
    answers, runtime = config.run.eval_answers, learner.runtime
    if answers is None:
        return found

    def on_token() -> bool:
        progress.tick()
        return runtime.stop_signal is not None

    limit = length_limit(config.model.path, ANY_LENGTH).num_tokens
    generator = Generator(learner.model, dataset.encoder, runtime.autocast, limit, on_token)
    output_dir = Path(config.run.output_dir)
    for one in dataset.eval:
        assert one.questions is not None
        found.append(AnswersEvaluation(one.name, one.questions, answers, generator, learner, output_dir, progress))
    return found
