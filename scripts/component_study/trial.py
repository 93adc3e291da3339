"""One run of the study: train a set of components, evaluate, and write every score that the tables need."""

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mmtrain.answers.evaluation import AnswerEvaluation
from mmtrain.answers.metrics import METRICS
from mmtrain.api import load_config, train
from mmtrain.atomic_files import write_text
from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.evaluate.models import BASE as BASE_MODEL
from mmtrain.generate.target import find_target, load_target
from mmtrain.model.named_model import NamedModel
from mmtrain.progress import QUIET
from mmtrain.runtime.processes import Runtime
from mmtrain.train.checkpoint import CheckpointFolder
from mmtrain.train.metrics import is_step

COMPONENTS = ("vision", "projector", "language")


@dataclass(frozen=True)
class Setting:
    """What is trained, and how. Without components: the base model."""

    mode: str
    subset: tuple[str, ...]
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.mode}_{'+'.join(self.subset)}_{self.rate:g}_{self.seed}"

    @staticmethod
    def named(name: str) -> "Setting":
        mode, subset, rate, seed = name.split("_")
        return Setting(mode, tuple(filter(None, subset.split("+"))), float(rate), int(seed))


BASE = Setting("none", (), 0.0, 0)


def result_path(work: Path, setting: Setting) -> Path:
    return work / f"{setting.name}.json"


def run_one(
    config_path: Path, overrides: list[str], other: Path, work: Path, setting: Setting, own_process: bool
) -> None:
    """Train and evaluate `setting`, and write its result. `own_process`: the process does nothing else, so its peak
    memory is the run's."""
    run = work / setting.name
    tune = {name: {"mode": setting.mode} for name in setting.subset} or {"language": {"mode": "lora"}}
    words = [
        f"tune={json.dumps(tune)}",
        f"train.seed={setting.seed}",
        f"run.output_dir={run}",
        *([f"train.learning_rate={setting.rate:.1e}"] if setting.subset else []),
    ]
    config = load_config(config_path, [*overrides, *words])
    cost = _train(config) if setting.subset else {}
    if setting.subset and own_process:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cost["peak_mib"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    path = str(run) if setting.subset else None
    result = {
        "setting": [setting.mode, list(setting.subset), setting.rate, setting.seed],
        **cost,
        "eval": _evaluate(config, list(config.data.eval), path, setting.mode),
        "other": _evaluate(config, [EvalSource(path=str(other))], path, setting.mode),
    }
    write_text(result_path(work, setting), json.dumps(result))


def _train(config: Config) -> dict[str, Any]:
    """What the training cost: trained parameters, and tokens per second after the first three steps."""
    run = train(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if is_step(row) and row["step"] > 3]
    newest = CheckpointFolder(run / "checkpoints", config.run.keep_checkpoints).newest()[0]
    assert newest is not None
    with safe_open(newest / "trainable.safetensors", framework="np") as file:
        num_trainable = sum(_size(file.get_slice(name).get_shape()) for name in file.offset_keys())
    return {
        "num_trainable": num_trainable,
        "tokens_per_second": sum(row["num_tokens"] for row in steps) / sum(row["seconds"] for row in steps),
    }


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _evaluate(config: Config, sources: list[EvalSource], run: str | None, mode: str) -> dict[str, list[float]]:
    """For each answer its sample, loss, tokens, divergence from the base model, and for each question whether the
    generated answer is right."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": tuple(sources)})})
    evaluation = ModelScoring(config, adapters=[run] if run is not None else [])
    name = BASE_MODEL if run is None else run
    with evaluation.model(name) as model:
        scores = evaluation.scores(model)
    distributions = evaluation.distributions(BASE_MODEL, name)
    settings = config.model
    target = NamedModel.of(config) if run is None else find_target(run)
    loaded = load_target(target, Runtime(settings.dtype, device=config.run.device))
    asked = AnswerEvaluation(config, sources, loaded.encoder.processor, QUIET, "exact_match")
    replies = asked.ask(loaded.generator, loaded.runtime, "answers", 32, None)
    right = [METRICS["exact_match"].score(replies[i].text, one.reference) for i, one in enumerate(asked.questions)]
    return {
        "sample": scores.sample.tolist(),
        "nll": scores.nll.tolist(),
        "num_tokens": scores.num_supervised.tolist(),
        "divergence": distributions.divergence.tolist(),
        "question_sample": [question.sample for question in asked.questions],
        "right": right,
    }
