"""What is seen of the keys of contrastive training, for test_config_keys: on three images with four texts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
from torch import nn

from mmtrain.config.schema import Config
from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.load import load_embedder
from mmtrain.errors import UserError
from mmtrain.progress import QUIET
from mmtrain.records.pairs import Item
from mmtrain.runtime.processes import Runtime
from mmtrain.train import run
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner, accumulate_gradients
from mmtrain.train.metrics import METRICS
from support.builders import write_jsonl
from support.seen import REFUSED
from support.tower_models import TOWERS

TEXTS = ("red", ["green", "a green one"], "blue")


def _with_pairs(config: Config) -> Config:
    """The config with a small dual encoder and pairs in its working directory."""
    name = "siglip" if config.objective.loss == "sigmoid" else "clip"
    if not Path(name).is_dir():
        TOWERS[name](Path(name))
    for n in range(len(TEXTS)):
        PIL.Image.new("RGB", (32, 32), (80 * n, 30, 200)).save(f"pair-{n}.png")
    write_jsonl(Path("three-pairs.jsonl"), [{"image": f"pair-{n}.png", "text": text} for n, text in enumerate(TEXTS)])
    data: dict[str, Any] = config.model_dump() | {"data": {"train": "three-pairs.jsonl"}}
    data["model"]["path"] = name
    return Config.model_validate(data)


def _after_a_step(config: Config) -> tuple[ContrastiveLearner, float]:
    config = _with_pairs(config)
    runtime = Runtime("float32", device="cpu")
    embedder = load_embedder(config, runtime)
    learner = make_contrastive_learner(config, embedder, PairDataset(config, embedder, QUIET), runtime, QUIET)
    loss, _ = accumulate_gradients(learner, learner.batches(1, 1), 1)
    return learner, float(loss)


def what_a_step_counts(config: Config) -> set[str]:
    config = _with_pairs(config) if config.objective.kind == "contrastive" else config
    run.train(config)
    first = (Path(config.run.output_dir) / METRICS).read_text().splitlines()[0]
    return {key for key in ("num_supervised", "num_pairs") if key in first}


def loss(config: Config) -> float:
    return round(_after_a_step(config)[1], 4)


def _is_trained(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def scale(config: Config) -> tuple[float, bool]:
    """What multiplies cosines, and whether it is trained."""
    found = _after_a_step(config)[0].embedder.scale
    return round(float(found.value), 3), _is_trained(found.parameter)


def bias(config: Config) -> tuple[float, bool]:
    found = _after_a_step(config)[0].embedder.bias
    return round(float(found.value), 3), _is_trained(found.parameter)


def num_trained_values(config: Config) -> int:
    """Of an image's embedding, those that the loss depends on."""
    model = _after_a_step(config)[0].model
    return int(model.visual_projection.weight.grad.abs().sum(1).gt(0).sum())


def num_kept_graphs(config: Config) -> int:
    return _after_a_step(config)[0].graph_memory.num_kept


def num_pooled_tokens(config: Config) -> int | str:
    """The hidden states that make the embedding of the prompt of "red"."""
    try:
        embedder = load_embedder(config, Runtime("float32", device="cpu"))
    except UserError:
        return REFUSED
    (item,) = embedder.encode([(Item("red"), Path())])
    assert isinstance(item, EncodedItem)
    rows: list[int] = []
    head = embedder.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[-2]))
    embedder.embed(embedder.batch([replace(item, key=16 * "0")]), item.kind)
    return rows[0]
