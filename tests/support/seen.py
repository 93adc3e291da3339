"""What can be seen of a config: of its data, of what is trainable, of what its run leaves and how it is executed.

Most of it is read from what a run leaves on the disk.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mmtrain.answers.evaluation import AnswerEvaluation
from mmtrain.config.schema import Config
from mmtrain.errors import UserError
from mmtrain.generate.replies import Generator
from mmtrain.model.components import Components
from mmtrain.model.kernels.trial import kernel_of
from mmtrain.model.load import load_model
from mmtrain.model.tune import apply_tune
from mmtrain.progress import QUIET
from mmtrain.records.record_set import RecordSet
from mmtrain.runtime import processes
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.supervisor import Supervisor
from mmtrain.train import learner, loop, run, trackers
from mmtrain.train.dataset import Dataset
from mmtrain.train.eval_perplexity import PerplexityEvaluation
from mmtrain.train.optimizer import make_optimizer, set_rate
from mmtrain.train.step import train_step
from mmtrain.train.trainable import make_trainable
from support.learning import learner_for, processor_for, step_of

REFUSED = "refused"


# --- the data ---


def dataset_of(config: Config) -> Dataset:
    return Dataset(config, processor_for(config.model), QUIET)


def or_refused(seen: Callable[[Dataset], Any]) -> Callable[[Config], Any]:
    def found(config: Config) -> Any:
        try:
            return seen(dataset_of(config))
        except UserError:
            return REFUSED

    return found


num_samples = or_refused(lambda dataset: len(dataset.checked.used))
num_eval_samples = or_refused(lambda dataset: len(dataset.eval[0].checked.used))
image_tokens = or_refused(lambda dataset: int(dataset.checked.num_image_tokens[0]))
eval_image_tokens = or_refused(lambda dataset: int(dataset.eval[0].checked.num_image_tokens[0]))
num_steps = or_refused(lambda dataset: dataset.num_steps)
samples_of_a_step = or_refused(lambda dataset: len(dataset.plan.step(1)))
steps_of_an_epoch = or_refused(lambda dataset: dataset.plan.steps_per_epoch)
num_samples_of_both_sides = or_refused(lambda dataset: len(dataset.checked.used) + len(dataset.eval[0].checked.used))
eval_name = or_refused(lambda dataset: dataset.eval[0].name)


def sources_of_the_first_step(config: Config) -> set[int]:
    dataset = dataset_of(config)
    return set(dataset.train.records.sources_of(np.array(dataset.plan.step(1))).tolist())


def metric_of_answers(config: Config) -> str:
    processor = processor_for(config.model)
    evaluation = AnswerEvaluation(config, config.data.eval, processor, QUIET)
    (metric,) = {question.metric for question in evaluation.questions}
    return metric


def group_of_a_pair(section: str) -> Callable[[Config], Any]:
    return lambda config: RecordSet(getattr(config.data, section)).pair(0).group


def sizes_of_windows(config: Config) -> list[int] | None:
    """The samples of each window of the first epoch; None without a stream."""
    stream = dataset_of(config).stream
    if stream is None:
        return None
    step, found = 0, list[int]()
    while sum(found) < 8:
        step += 1
        found += [window.num_used for window in stream.begin(step)]
    stream.close()
    return found


num_dropped = or_refused(lambda dataset: len(dataset.checked.dropped))
num_skipped = or_refused(lambda dataset: len(dataset.checked.skipped))


def text_trained_on(config: Config) -> str:
    encoded = dataset_of(config).train.encoded(0)
    tokenizer = Tokenizer.from_file(f"{config.model.path}/tokenizer.json")
    text: str = tokenizer.decode(encoded.ids[encoded.supervised].tolist(), skip_special_tokens=False)
    return text


# --- the model, and what is trainable ---


def model_type(config: Config) -> str:
    found: str = learner_for(config)[0].model.config.model_type
    return found


def frozen_types(config: Config) -> set[torch.dtype]:
    return {parameter.dtype for parameter in tuned(config)[0].parameters() if not parameter.requires_grad}


def quantized_layers(config: Config) -> int:
    return sum("Linear4bit" in repr(type(one)) and not hasattr(one, "lora_A") for one in tuned(config)[0].modules())


def tuned(config: Config) -> tuple[Any, Any]:
    processor, quantization = processor_for(config.model), config.model.quantization
    base = load_model(config.model.path, config.model.dtype, processor, quantization=quantization)
    components = Components(base, config.tune.components)
    model, _ = apply_tune(base, components, config.tune)
    return model, make_optimizer(model, components, config)


def starts_with_new_adapters(config: Config) -> bool:
    """Whether B of all adapters is zero before the first step. An earlier run that the config names is made first."""
    if config.model.adapter is not None:
        data = config.model_dump()
        data["model"]["adapter"], data["run"]["output_dir"] = None, config.model.adapter
        run.train(Config.model_validate(data))
    processor = processor_for(config.model)
    made = make_trainable(config, processor, Runtime(config.model.dtype), QUIET).model
    return not any(p.any() for name, p in made.named_parameters() if "lora_B" in name)


def component_of(name: str) -> str:
    """Of a parameter or module of Qwen2.5-VL."""
    return "projector" if "visual.merger" in name else "vision" if "visual." in name else "language"


def trainable_kinds(config: Config, component: str) -> set[str]:
    named = tuned(config)[0].named_parameters()
    of_component = [name for name, parameter in named if parameter.requires_grad and component_of(name) == component]
    return {"adapter" if "lora_" in name else "own" for name in of_component}


def is_trainable(name: str) -> Callable[[Config], bool]:
    """Of a parameter of the base model."""
    return lambda config: dict(tuned(config)[0].named_parameters())[name].requires_grad


def rates(config: Config, component: str) -> set[float]:
    model, optimizer = tuned(config)
    set_rate(optimizer, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {g["lr"] for g in groups for p in g["params"] if component_of(names[id(p)]) == component}


def adapters(config: Config, component: str) -> dict[str, Any]:
    modules = tuned(config)[0].named_modules()
    return {name: one for name, one in modules if hasattr(one, "lora_A") and component_of(name) == component}


def ranks(config: Config, component: str) -> set[int]:
    return {one.lora_A["default"].weight.shape[0] for one in adapters(config, component).values()}


def scalings(config: Config, component: str) -> set[tuple[float, bool]]:
    """What an adapter's output is multiplied by, and whether it has a magnitude (DoRA)."""
    found = adapters(config, component).values()
    return {(one.scaling["default"], len(one.lora_magnitude_vector) > 0) for one in found}


def adapted(config: Config, component: str) -> set[str]:
    return {name.rsplit(".", 1)[1] for name in adapters(config, component)}


def computes_without_dropout(config: Config, component: str) -> bool:
    data = config.model_dump()
    data["tune"][component]["dropout"] = 0.0
    losses = []
    for one in (config, Config.model_validate(data)):
        learner, dataset = learner_for(one)
        losses.append(step_of(learner, dataset, [[0, 2]], packing=True)[0])
    return losses[0] == losses[1]


# --- what a run leaves ---


def folders_written(config: Config) -> list[str]:
    before = set(Path().glob("*/metrics.jsonl"))
    run.train(config)
    return [path.parent.name for path in set(Path().glob("*/metrics.jsonl")) - before]


def checkpoint(config: Config, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.output_dir) / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def saved_steps(config: Config) -> list[int]:
    run.train(config)
    return sorted(int(path.name[5:]) for path in (Path(config.run.output_dir) / "checkpoints").glob("step-*"))


def trackers_started(config: Config) -> list[str]:
    found: list[str] = []

    def note(name: str) -> Any:
        return lambda *arguments: found.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "_TRACKERS", {name: note(name) for name in trackers._TRACKERS})
        trackers.Trackers(config, 0, print)
    return found


def last_step(config: Config) -> int:
    """Of a run whose evaluations give the number of the step as `nll`, which gets worse, and as `token_accuracy`, which
    gets better."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerplexityEvaluation, "row", _counted)
        run.train(config)
    steps: list[int] = [row["step"] for row in rows(config)]
    return max(steps)


def _counted(self: PerplexityEvaluation, step: int) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(("nll", "perplexity", "token_accuracy"), step)
    return figures | {"num_supervised": 1, "num_samples": 1, "interval": {"perplexity": [0, 1]}}


def best_step(config: Config) -> int | None:
    """The step whose weights are in `best/`; None without it."""
    last_step(config)
    path = Path(config.run.output_dir) / "best" / "adapter_model.safetensors"
    if not path.exists():
        return None
    name = next(key for key in load_file(path) if "lora_B" in key)
    found = load_file(path)[name]
    steps = [s for s in range(1, 5) if torch.equal(found, _of_step(config, s, name))]
    assert len(steps) == 1
    return steps[0]


def _of_step(config: Config, step: int, name: str) -> torch.Tensor:
    return checkpoint(config, step, "trainable")[name.replace("lora_B", "lora_B.default")]


def times_asked(config: Config) -> list[tuple[int, int]]:
    """The steps after which questions are asked, and how many are answered."""
    run.train(config)
    return [(row["step"], row["num_answers"]) for row in rows(config) if "answers" in row]


def questions_at_a_time(config: Config) -> list[int]:
    """Of each batch of questions before the first step."""
    found: list[int] = []
    replies = Generator.replies

    def watched(self: Generator, prompts: Any, *others: Any) -> Any:
        found.append(len(prompts))
        num_found = len(found)
        made = replies(self, prompts, *others)
        del found[num_found:]  # batches that this one asked for
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "replies", watched)
        run.train(config)
    return found[: len(found) // 2]


def steps_evaluated(config: Config) -> list[int]:
    run.train(config)
    return [row["step"] for row in rows(config) if "eval" in row]


def adam_direction(config: Config, step: int, name: str) -> torch.Tensor:
    """What the rate is multiplied by in the update of `step` (Kingma and Ba, 2015), from the moments on the disk."""
    moments = checkpoint(config, step, "optimizer")
    mean = moments[f"{name}|exp_avg"] / (1 - 0.9**step)
    return mean / ((moments[f"{name}|exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)


def rate_at(step: int) -> Callable[[Config], Any]:
    """The rate by which the update of `step` moved the adapters' B, which is zero before the first one."""

    def seen(config: Config) -> Any:
        run.train(config)
        now = checkpoint(config, step, "trainable")
        before = (
            checkpoint(config, step - 1, "trainable") if step > 1 else {n: torch.zeros_like(w) for n, w in now.items()}
        )
        names = [name for name in now if "lora_B" in name]
        moved = math.sqrt(sum(float((now[n] - before[n]).pow(2).sum()) for n in names))
        direction = math.sqrt(sum(float(adam_direction(config, step, n).pow(2).sum()) for n in names))
        return pytest.approx(moved / direction, rel=1e-3)

    return seen


def weight_decay(config: Config) -> Any:
    """What the second update took from the adapters' A besides the step along Adam's direction."""
    run.train(config)
    before, now = checkpoint(config, 1, "trainable"), checkpoint(config, 2, "trainable")
    name, rate = next(name for name in now if "lora_A" in name), config.train.learning_rate
    decayed = before[name] - now[name] - rate * adam_direction(config, 2, name)
    return pytest.approx(float((decayed * before[name]).sum() / before[name].pow(2).sum()) / rate, abs=1e-3)


def norm_of_the_first_gradient(config: Config) -> Any:
    """As AdamW got it: its first moment is then a tenth of the gradient. None where it is the norm before clipping."""
    run.train(config)
    moments = checkpoint(config, 1, "optimizer")
    norm = 10 * math.sqrt(sum(float(m.pow(2).sum()) for name, m in moments.items() if name.endswith("|exp_avg")))
    whole = next(row["grad_norm"] for row in rows(config) if row["step"] == 1 and "eval" not in row)
    assert whole > 0.1
    return None if norm == pytest.approx(whole, rel=1e-4) else pytest.approx(norm, rel=1e-4)


def same_as_seed_0(config: Config) -> tuple[bool, bool]:
    """Whether the order of the samples and the adapters' initial weights are those of seed 0."""
    found = []
    for one in (config, Config.model_validate(config.model_dump() | {"train": {"seed": 0, "batch_size": 2}})):
        dataset = dataset_of(one)
        order = list(itertools.chain.from_iterable(dataset.plan.step(step) for step in range(1, 5)))
        torch.manual_seed(99)
        learner, _ = learner_for(one)
        found.append((order, next(p.detach() for n, p in learner.model.named_parameters() if "lora_A" in n)))
    return found[0][0] == found[1][0], torch.equal(found[0][1], found[1][1])


# --- how a run is executed ---


def microbatches(config: Config) -> list[tuple[int, bool]]:
    """The number of micro-batches of the first step, and whether their samples are packed."""
    found = []
    take = train_step

    def watched(learner: Any, own: Any, *others: Any) -> Any:
        batches = list(own)
        found.append((len(batches), all(batch.packed for batch in batches)))
        return take(learner, iter(batches), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        run.train(config)
    return found[:1]


def num_shardings(config: Config) -> int:
    """How often the weights of a model are sharded, were it one of two processes."""
    runtime, calls = Runtime("float32"), []
    runtime.num_processes, runtime._store = 2, HashStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "shard", lambda *arguments: calls.append(arguments))
        learner.make_learner(config, processor_for(config.model), runtime, QUIET)
    return len(calls)


def device(config: Config) -> str:
    """On a machine without a GPU."""
    found = list[str]()

    def stop(*arguments: Any) -> None:
        found.append(str(arguments[3].device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(run, "_train", stop)
        try:
            run.train(config)
        except UserError:
            return REFUSED
    return found[0]


def num_threads(config: Config) -> int:
    run.train(config)
    return torch.get_num_threads()


def seconds_of_the_supervisor(config: Config) -> list[float]:
    found: list[float] = []

    class Watched(Supervisor):
        def __init__(self, *arguments: Any) -> None:
            found.extend(one for one in arguments if isinstance(one, float))
            super().__init__(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Supervisor", Watched)
        run.train(config)
    return found


def forward_passes_of_a_layer(config: Config) -> int:
    learner, dataset = learner_for(config)
    calls: list[int] = []
    attention = learner.model.get_base_model().get_decoder().layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    step_of(learner, dataset, [[0, 1]], packing=True)
    return len(calls)


def has_kernels(config: Config) -> bool:
    """Whether any module of the model is computed by a kernel."""
    learner, _ = learner_for(config)
    return any(kernel_of(module) is not None for module in learner.model.modules())


def is_compiled(config: Config) -> bool:
    """Whether torch compiles a layer when it is first called, which takes long and is left out."""
    learner, _ = learner_for(config)
    return learner.model.get_base_model().get_decoder().layers[0]._compiled_call_impl is not None


def calls_of_the_tower_again(config: Config) -> tuple[int, bool]:
    """Of the vision encoder in a second step over the same image; and whether anything is cached on disk."""
    learner, dataset = learner_for(config)
    step_of(learner, dataset, [[0]], packing=True)
    calls: list[int] = []
    learner.model.get_base_model().get_encoder(modality="image").register_forward_hook(lambda *_: calls.append(1))
    step_of(learner, dataset, [[0]], packing=True)
    cached = Path.home() / ".cache" / "mmtrain" / "features"
    return len(calls), any(path.is_file() for path in cached.rglob("*"))
