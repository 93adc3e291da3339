"""The evaluations of a run over chats: perplexity, and answers to some questions."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.config import Config
from mmtrain.generate.replies import Generator, Sharded
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress
from mmtrain.train.dataset import Dataset
from mmtrain.train.eval_answers import AnswersEvaluation
from mmtrain.train.eval_perplexity import PerplexityEvaluation
from mmtrain.train.evaluations import RunEvaluation
from mmtrain.train.step import Learner


def make_evaluations(config: Config, dataset: Dataset, learner: Learner, progress: Progress) -> list[RunEvaluation]:
    """Those of a run, in order."""
    found: list[RunEvaluation] = [PerplexityEvaluation(config, one, learner, progress) for one in dataset.eval]
    answers, runtime = config.run.eval_answers, learner.runtime
    if answers is None:
        return found

    def on_token() -> bool:
        progress.tick()
        return runtime.stop_signal is not None

    limit = length_limit(config.model.path).num_tokens
    sharded = _sharded(learner) if learner.sharded else None
    generator = Generator(
        learner.model, dataset.encoder, runtime.autocast, limit, on_token, sharded, lambda: learner.alone
    )
    output_dir = Path(config.run.output_dir)
    for one in dataset.eval:
        assert one.questions is not None
        found.append(AnswersEvaluation(one.name, one.questions, answers, generator, learner, output_dir, progress))
    return found


def _sharded(learner: Learner) -> Sharded:
    def inside(generate: Callable[[], Tensor]) -> Tensor:
        found: Tensor = learner.root(lambda model: generate())
        return found

    def all_have_ended(own: bool) -> bool:
        num_unfinished, stop_signal = learner.runtime.agree(torch.tensor([float(not own)], dtype=torch.float64))
        return stop_signal is not None or not num_unfinished.item()

    return Sharded(inside, all_have_ended)
