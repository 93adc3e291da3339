"""`mmtrain eval answers`: how good a model's answers are, and whether they are better than blind guessing."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmtrain.answers.evaluation import AnswerEvaluation
from mmtrain.answers.figures import figures
from mmtrain.answers.metrics import METRICS
from mmtrain.answers.report import print_report
from mmtrain.command_output import check_page
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.generate.target import Loaded, load_evaluated
from mmtrain.model.adapter import say_other_processor
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import shown
from mmtrain.scoring.eval_samples import sources_to_evaluate
from mmtrain.scoring.results import show


@dataclass(frozen=True, slots=True)
class AnswersOptions:
    """What the command line says besides the config."""

    adapter: Path | None = None
    data: tuple[str, ...] = ()
    metric: str | None = None
    html: Path | None = None
    json: bool = False
    batch_size: int = 16
    max_new_tokens: int | None = None


def eval_answers(config: Config, options: AnswersOptions) -> None:
    """Generate, score, compare, and print. Raises UserError for what the user can fix."""
    runtime = Runtime(config.model.dtype, device=config.run.device)
    row, evaluation = answer_figures(config, options, runtime)
    if runtime.is_main:
        from mmtrain.answers.page import page_of_answers

        show(row, options.json, print_report, options.html, lambda found: page_of_answers(found, evaluation.samples))
    runtime.close()


def answer_figures(
    config: Config, options: AnswersOptions, runtime: Runtime | None = None
) -> tuple[dict[str, Any], AnswerEvaluation]:
    """Every figure, as `--json` prints them, and what they were computed from. Raises UserError as above.

    Processes share the questions (`runtime`; None: there is this one), and all get the figures.
    """
    config.objective.check_command("eval answers", "chat", "eval retrieval")
    if options.metric is not None and options.metric not in METRICS:
        raise UserError(f"--metric {shown(options.metric)}: expected one of {', '.join(METRICS)}")
    sources = sources_to_evaluate(config, options.data)
    check_page(options.html)
    runtime = runtime or Runtime(config.model.dtype, device=config.run.device)
    progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
    if options.adapter is not None:
        say_other_processor(options.adapter, config.model, progress.say)
    loaded = load_evaluated(config, options.adapter, runtime)
    evaluation = AnswerEvaluation(config, sources, loaded.encoder.processor, progress, options.metric)
    how = options.batch_size, options.max_new_tokens
    replies = evaluation.ask_in_all_ways(loaded.generator, runtime, *how)
    if options.adapter is not None:
        base, as_base = _base(loaded, config)
        with as_base:
            replies["base"] = evaluation.ask(base.generator, runtime, "answers of the base model", *how)
    row = figures(evaluation.questions, evaluation.places, replies, evaluation.reasons)
    row["dropped"] = evaluation.dropped
    return row, evaluation


def _base(loaded: Loaded, config: Config) -> tuple[Loaded, AbstractContextManager[Any]]:
    """The base model, and the context in which it is that."""
    if isinstance(loaded.model, PeftModel):
        return loaded, loaded.model.disable_adapter()
    return load_evaluated(config, None, loaded.runtime), nullcontext()
