"""`mmtrain eval answers`: how good a model's answers are, and whether they are better than blind guessing."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmtrain.answers.evaluation import AnswerEvaluation
from mmtrain.answers.figures import figures
from mmtrain.answers.metrics import METRICS
from mmtrain.answers.question_set import Replies
from mmtrain.answers.report import print_report
from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.errors import UserError
from mmtrain.generate.target import Loaded, Target, load_target
from mmtrain.model.adapter import find_adapter, find_model, say_other_processor
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import shown, visible
from mmtrain.scoring.results import check_page, show


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says besides the config."""

    adapter: Path | None = None
    data: tuple[str, ...] = ()
    metric: str | None = None
    html: Path | None = None
    json: bool = False
    batch_size: int = 16
    max_new_tokens: int | None = None


def eval_answers(config: Config, options: Options) -> None:
    """Generate, score, compare, and print. Raises UserError for what the user can fix."""
    runtime = Runtime(config.model.dtype, device=config.run.device)
    row, evaluation = answer_figures(config, options, runtime)
    if runtime.is_main:
        from mmtrain.answers.page import write_page

        show(row, options.json, print_report, options.html, lambda path: write_page(path, row, evaluation.samples))
    runtime.close()


def answer_figures(
    config: Config, options: Options, runtime: Runtime | None = None
) -> tuple[dict[str, Any], AnswerEvaluation]:
    """Every figure, as `--json` prints them, and what they were computed from. Raises UserError as above.

    Processes share the questions (`runtime`; None: there is this one), and all get the figures.
    """
    config.objective.check_command("eval answers", "chat", "eval retrieval")
    if options.metric is not None and options.metric not in METRICS:
        raise UserError(f"--metric {shown(options.metric)}: expected one of {', '.join(METRICS)}")
    sources = [EvalSource(path=path) for path in options.data] or list(config.data.eval)
    if not sources:
        raise UserError("data.eval: there are no sources in the config; give some, or --data FILE")
    check_page(options.html)
    target = answers_target(config, options.adapter)
    runtime = runtime or Runtime(config.model.dtype, device=config.run.device)
    progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
    if options.adapter is not None:
        say_other_processor(options.adapter, config.model, progress.say)
    loaded = load_target(target, runtime)
    evaluation = AnswerEvaluation(config, sources, loaded.encoder.processor, progress, options.metric)
    replies = _replies(evaluation, loaded, options)
    if options.adapter is not None:
        replies["base"] = _base_replies(evaluation, loaded, config, options)
    row = figures(evaluation.questions, evaluation.places, replies, evaluation.reasons)
    row["dropped"] = evaluation.dropped
    return row, evaluation


def answers_target(config: Config, path: Path | None) -> Target:
    """What is evaluated: the base model, an adapter on it, or the model that a run saved."""
    settings = config.model
    base = Target(settings.path, None, config.labels, settings.dtype, settings.quantization, settings)
    if path is None:
        return base
    adapter, model = find_adapter(path), find_model(path)
    if adapter is None and model is None:
        raise UserError(f"--adapter {visible(str(path))}: expected the directory of an adapter or of a finished run")
    if adapter is not None:
        return replace(base, adapter=adapter)
    return replace(base, model=str(model), quantization=None)


def _replies(evaluation: AnswerEvaluation, loaded: Loaded, options: Options) -> dict[str, Replies]:
    """By kind: the model's, and its with the images of others and without images, where there are such."""
    asked = loaded.generator, loaded.runtime
    size, limit = options.batch_size, options.max_new_tokens
    changed = evaluation.replies_with_changed_images
    found = {
        "model": evaluation.all_replies(*asked, "answers", size, limit),
        "swapped": changed(*asked, "swapped", "answers with swapped images", size, limit),
        "no_images": changed(*asked, "none", "answers without images", size, limit),
    }
    return {kind: replies for kind, replies in found.items() if replies}


def _base_replies(evaluation: AnswerEvaluation, loaded: Loaded, config: Config, options: Options) -> Replies:
    is_adapted = isinstance(loaded.model, PeftModel)
    without: AbstractContextManager[Any] = loaded.model.disable_adapter() if is_adapted else nullcontext()
    base = loaded if is_adapted else load_target(answers_target(config, None), loaded.runtime)
    with without:
        return evaluation.all_replies(
            base.generator, base.runtime, "answers of the base model", options.batch_size, options.max_new_tokens
        )
