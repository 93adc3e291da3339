"""`mmtrain eval perplexity`: how likely the right answers are, what the images are worth, and adapters compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.evaluate.models import BASE
from mmtrain.evaluate.report import image_verdict, print_comparison, print_report
from mmtrain.generate.questions import questions_of
from mmtrain.scoring import statistics
from mmtrain.scoring.changed_images import CHANGES
from mmtrain.scoring.distributions import Distributions, calibration_figures
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.scoring.results import show
from mmtrain.scoring.scores import Scores
from mmtrain.scoring.statistics import per_token


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """What the command line says besides the config."""

    adapter: Path | None = None
    compare: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    images: bool = False
    json: bool = False

    @property
    def adapters(self) -> list[str]:
        """The directories of all adapters that the command names, each once."""
        alone = () if self.adapter is None else (str(self.adapter),)
        return [path for path in dict.fromkeys((*alone, *self.compare)) if path != BASE]


def eval_perplexity(config: Config, options: PerplexityOptions) -> None:
    """Evaluate or compare, and print. Raises UserError for what the user can fix."""
    evaluation = ModelScoring(config, options.data, options.adapters)
    row: Any = _compare(evaluation, options.compare) if options.compare else figures(evaluation, options)
    if not evaluation.is_main:
        return
    show(row, options.json, print_comparison if options.compare else print_report)


def perplexity_figures(config: Config, options: PerplexityOptions) -> dict[str, Any]:
    """Every figure of one model on `data.eval`. Raises UserError as above."""
    return figures(ModelScoring(config, options.data, options.adapters), options)


def figures(evaluation: ModelScoring, options: PerplexityOptions) -> dict[str, Any]:
    """Every figure of one model, as `--json` prints them."""
    path = str(options.adapter) if options.adapter is not None else None
    with evaluation.model(path) as model:
        scores = evaluation.scores(model)
        least, most = statistics.extremes(scores)
        return {
            **statistics.summary(scores),
            "dropped": evaluation.eval_samples.dropped,
            "sources": statistics.by_source(scores, evaluation.eval_samples.names),
            "turns": statistics.by_answer(scores),
            "modality": statistics.by_image(scores),
            "lengths": statistics.by_length(scores),
            "least_likely": [_placed(evaluation, *entry) for entry in least],
            "most_likely": [_placed(evaluation, *entry) for entry in most],
            "images": _images(evaluation, model, scores) if options.images else None,
        }


def _placed(evaluation: ModelScoring, index: int, nll: float) -> dict[str, Any]:
    """A sample by its place, with its first trained reply and the question to it."""
    own = evaluation.eval_samples
    conversation = own.samples.records.conversation(index)
    first = questions_of(conversation, index, own.encoder.trained_turns(conversation.messages))[0]
    place = str(own.samples.place(index))
    return {"place": place, "nll": nll, "question": first.text, "reference": first.reference}


def _images(evaluation: ModelScoring, model: LoadedModel, right: Scores) -> dict[str, Any]:
    """What the right images are worth against others, grey ones and none, over the samples that can be changed."""
    found: dict[str, Any] = {}
    for change in CHANGES:
        changed = evaluation.changed_scores(model, change)
        if changed is not None:
            scores, indices, num_left_out = changed
            found[change] = {
                **statistics.difference(right.of(indices), scores),
                "nll": statistics.summary(scores)["nll"],
                "num_samples": len(indices),
                "num_left_out": num_left_out,
            }
    if not found:
        raise UserError("--images: no sample has an image that could be changed")
    return {**found, "verdict": image_verdict(found)}


def _compare(evaluation: ModelScoring, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each model, with its paired difference and its divergence from the first."""
    rows: list[dict[str, Any]] = []
    first: Scores | None = None
    for name in names:
        with evaluation.model(name) as model:
            scores = evaluation.scores(model)
        found = statistics.summary(scores)
        difference = None if first is None else statistics.difference(first, scores)
        first = scores if first is None else first
        figures = {key: found[key] for key in ("perplexity", "nll", "token_accuracy", "bits_per_byte", "interval")}
        rows.append({"name": name, **figures, "difference": difference})
    for number, row in list(enumerate(rows))[len(rows) > 1 :]:
        pair = evaluation.distributions(names[0], names[number])
        row |= _distribution(pair, 1) | {"divergence": per_token(pair.sample, pair.divergence, pair.num_tokens)}
        rows[0] |= _distribution(pair, 0) | {"divergence": None}
    return rows


def _distribution(pair: Distributions, number: int) -> dict[str, Any]:
    """Entropy in nats per token and calibration of the first (0) or the second (1) of two models."""
    return {
        "entropy": per_token(pair.sample, pair.entropy[:, number], pair.num_tokens),
        "calibration": calibration_figures(pair.calibration[:, number].sum(axis=0)),
    }
