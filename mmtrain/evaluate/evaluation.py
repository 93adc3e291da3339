"""The samples that are evaluated, and scores of models on them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from mmtrain.config import Config
from mmtrain.dataset.plan import Indices
from mmtrain.encoding.load import processor_of
from mmtrain.evaluate.models import BASE, ComparedModels, find_models
from mmtrain.model.adapter import say_other_processor
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.changed_images import Change
from mmtrain.scoring.distributions import NUM_COLUMNS, Distributions
from mmtrain.scoring.eval_samples import EvalSamples, sources_to_evaluate
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.scoring.scorer import Scorer
from mmtrain.scoring.scores import Scores


class ModelScoring:
    """The samples of a config's evaluation sources, and the scores of models on them."""

    def __init__(self, config: Config, data: Sequence[str] = (), adapters: Sequence[str] = ()) -> None:
        """`data`: files to score instead of `data.eval`; `adapters`: directories of adapters, or of runs, to be scored.

        Raises UserError where a model or a sample cannot be used.
        """
        config.objective.check_command("eval perplexity", "chat", "eval retrieval")
        sources = sources_to_evaluate(config, data)
        found = find_models(adapters, config.model)
        runtime = Runtime(config.model.dtype, device=config.run.device)
        self.is_main = runtime.is_main
        self._microbatch_tokens = config.run.microbatch_tokens
        self._progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
        for path in found.adapters:
            say_other_processor(Path(path), config.model, self._progress.say)
        processor = processor_of(config.model)
        self.eval_samples = EvalSamples.of(config, sources, processor, self._progress)
        for entry in self.eval_samples.dropped:
            self._progress.say(f"dropped: {entry['place']}: {entry['reason']}")
        self._models = ComparedModels(config, found, processor, runtime, self._progress)

    def model(self, name: str | None) -> AbstractContextManager[LoadedModel]:
        """One of the models by its path; None or `base`: the base model alone."""
        return self._models.model(BASE if name is None else name)

    def distributions(self, first: str, second: str) -> Distributions:
        """The next-token distributions of two of the models at the same tokens."""
        pair = self._models.pair(first, second)
        scorer = self._scorer()
        sums = scorer.sums(pair.first, self._microbatch_tokens, self._progress, NUM_COLUMNS, pair.columns)
        assert sums is not None  # only a run that is supervised stops on the way
        return Distributions.of(scorer.sample, sums)

    def scores(self, model: LoadedModel) -> Scores:
        return self._score(model, self._scorer())

    def changed_scores(self, model: LoadedModel, change: Change) -> tuple[Scores, Indices, int] | None:
        """The scores with changed images, the samples they are of, and how many with images are left out because they
        cannot be changed so; None where no sample can."""
        own = self.eval_samples
        changed, indices, lengths = own.changed(change)
        if not len(indices):
            return None
        scores = self._score(model, Scorer(own.samples, own.encoder, indices, lengths, changed))
        return scores, indices, len(own.with_images()) - len(indices)

    def _scorer(self) -> Scorer:
        own = self.eval_samples
        return Scorer(own.samples, own.encoder, own.indices, own.checked.num_tokens[own.indices].tolist())

    def _score(self, model: LoadedModel, scorer: Scorer) -> Scores:
        scores = scorer.score(model, self._microbatch_tokens, self._progress)
        assert scores is not None  # only a run that is supervised stops on the way
        return scores
