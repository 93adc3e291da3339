"""The samples that are evaluated, and scores of models on them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.dataset.plan import Indices
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.model.adapter import read_adapter
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.adapters import AdaptedModels
from mmtrain.scoring.changed_images import Change
from mmtrain.scoring.eval_samples import EvalSamples
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.scoring.scorer import Scorer
from mmtrain.scoring.scores import Scores

BASE = "base"
"""Names the base model among adapters."""


class Evaluation:
    """The samples of a config's evaluation sources, and the scores of models on them."""

    def __init__(self, config: Config, data: Sequence[str] = (), adapters: Sequence[str] = ()) -> None:
        """`data`: files to score instead of `data.eval`; `adapters`: directories of those that will be scored.

        Raises UserError where an adapter, a sample or the model cannot be used.
        """
        sources: Sequence[EvalSource] = [EvalSource(path=path) for path in data] or config.data.eval
        if not sources:
            raise UserError("data.eval: there are no sources in the config; give some, or --data FILE")
        read = {path: read_adapter(path) for path in adapters}
        runtime = Runtime(config.model.dtype, device=config.run.device)
        self.is_main = runtime.is_main
        self._microbatch_tokens = config.run.microbatch_tokens
        self._progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
        processor = load_processor(config.model.path, config.model.chat_template)
        self.eval_samples = EvalSamples.of(config, sources, processor, self._progress)
        for entry in self.eval_samples.dropped:
            self._progress.say(f"dropped: {entry['place']}: {entry['reason']}")
        self._models = AdaptedModels(config, processor, runtime, self._progress, read)

    def model(self, adapter: str | None) -> AbstractContextManager[LoadedModel]:
        """The model with one of the adapters; None or `base`: the base model alone."""
        return self._models.adapted(None if adapter == BASE else adapter)

    def scores(self, model: LoadedModel) -> Scores:
        own = self.eval_samples
        lengths = own.checked.num_tokens[own.indices].tolist()
        return self._score(model, Scorer(own.samples, own.encoder, own.indices, lengths))

    def changed_scores(self, model: LoadedModel, change: Change) -> tuple[Scores, Indices, int] | None:
        """The scores with changed images, the samples they are of, and how many with images are left out because they
        cannot be changed so; None where no sample can."""
        own = self.eval_samples
        changed, indices, lengths = own.changed(change)
        if not len(indices):
            return None
        scores = self._score(model, Scorer(own.samples, own.encoder, indices, lengths, changed))
        return scores, indices, len(own.with_images()) - len(indices)

    def _score(self, model: LoadedModel, scorer: Scorer) -> Scores:
        scores = scorer.score(model, self._microbatch_tokens, self._progress)
        assert scores is not None  # only a run that is supervised stops on the way
        return scores
