"""`mmtrain eval retrieval`: how well items find the items that match them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmtrain.command_output import check_page
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.retrieval.evaluated import base_of, loaded_embedder
from mmtrain.retrieval.evaluation import RetrievalEvaluation
from mmtrain.retrieval.report import print_report
from mmtrain.retrieval.zero_shot import read_classes
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.eval_samples import sources_to_evaluate
from mmtrain.scoring.results import show


@dataclass(frozen=True, slots=True)
class RetrievalOptions:
    """What the command line says besides the config."""

    adapter: Path | None = None
    compare: Literal["base"] | None = None
    data: tuple[str, ...] = ()
    classes: Path | None = None
    templates: tuple[str, ...] = ()
    html: Path | None = None
    json: bool = False


def eval_retrieval(config: Config, options: RetrievalOptions) -> None:
    """Embed, rank and print. Raises UserError for what the user can fix."""
    row, evaluation = retrieval_figures(config, options)
    from mmtrain.retrieval.page import page_of_retrieval

    show(row, options.json, print_report, options.html, lambda found: page_of_retrieval(found, evaluation.content))


def retrieval_figures(config: Config, options: RetrievalOptions) -> tuple[dict[str, Any], RetrievalEvaluation]:
    """Every figure, as `--json` prints them, and what they were computed from. Raises UserError as above."""
    _check(config, options)
    sources = sources_to_evaluate(config, options.data)
    classes = None if options.classes is None else read_classes(options.classes, options.templates)
    runtime = Runtime(config.model.dtype, device=config.run.device)
    if runtime.num_processes > 1:
        raise UserError("eval retrieval: it runs in one process: start it without a launcher")
    progress = Progress(runtime.activity.tick)
    embedder = loaded_embedder(config, options.adapter, runtime, progress)
    evaluation = RetrievalEvaluation(config, sources, embedder, progress, classes)
    own = evaluation.embed(embedder)
    if options.compare is None:
        return evaluation.figures(own), evaluation
    base, without = base_of(config, embedder, runtime, progress)
    with without:
        return evaluation.figures(own, evaluation.embed(base)), evaluation


def _check(config: Config, options: RetrievalOptions) -> None:
    config.objective.check_command("eval retrieval", "contrastive", "eval answers or eval perplexity")
    if options.compare is not None and options.adapter is None:
        raise UserError("--compare base: there is nothing to compare with the base model: give --adapter too")
    if options.templates and options.classes is None:
        raise UserError("--template: it is for zero-shot classification: give --classes too")
    check_page(options.html)
