"""The image cache of a vision-language model that is trained as an embedder: the same bits, and each image once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.contrastive.embedder import Passes
from mmtrain.plan.pairs import pair_figures, pair_lines
from mmtrain.progress import QUIET
from mmtrain.retrieval.command import RetrievalOptions, retrieval_figures
from mmtrain.train import loop
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.contrastive.step import ContrastiveLearner, accumulate_gradients
from mmtrain.train.run import train
from mmtrain.train.step import train_step
from support.builders import TINY
from support.pair_data import Exchange, learner_of, pair_config, write_pairs

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
NUM_IMAGES = 17
KEPT, COMPUTED, OFF = ({"memory_gib": size} for size in (2.0, 1e-9, 0.0))
Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(cache: dict[str, float], **run: Any) -> Config:
        own = {"image_cache": cache, "microbatch_tokens": 300, "eval_every": 2, "checkpoint_every": 2, **run}
        pairs = tmp_path / "data" / "pairs.jsonl"
        return pair_config(
            TINY,
            pairs if pairs.exists() else write_pairs(pairs.parent),
            tmp_path / "run",
            tune={"language": LORA},
            objective={"scale": 20.0, "pooling": "last"},
            run=own,
        )

    return made


def count_images(learner: ContrastiveLearner) -> list[int]:
    """The images of each call of the vision tower from now on."""
    found: list[int] = []
    (root,) = learner.embedder.components.roots("vision")
    tower = learner.embedder.model.get_base_model().get_submodule(root)
    tower.register_forward_pre_hook(lambda _, args, given: found.append(len(given["grid_thw"])), with_kwargs=True)
    return found


def step(learner: ContrastiveLearner) -> tuple[float, dict[str, Tensor]]:
    learner.optimizer.zero_grad(set_to_none=True)
    loss, _ = accumulate_gradients(learner, (learner.load(own) for own in learner.cuts.of(1).own), 1)
    return float(loss), {
        n: p.grad.clone() for n, p in trainable_parameters(learner.model).items() if p.grad is not None
    }


@pytest.mark.parametrize("graph_memory", [0.0, pytest.param(2.0, marks=pytest.mark.slow("three models"))])
def test_each_image_goes_through_a_frozen_tower_once_and_no_bit_depends_on_it(graph_memory: float, make: Make) -> None:
    learners = {
        name: learner_of(make(cache, graph_memory_gib=graph_memory), Exchange(1), 0)
        for name, cache in (("kept", KEPT), ("computed", COMPUTED), ("off", OFF))
    }
    images = {name: count_images(learner) for name, learner in learners.items()}
    found = {name: [step(learner) for _ in range(2)] for name, learner in learners.items()}
    assert images["kept"] == [1] * NUM_IMAGES
    assert sum(images["off"]) == sum(images["computed"]) == NUM_IMAGES * (2 if graph_memory else 4)
    loss, gradients = found["computed"][0]
    for other_loss, others in (*found["kept"], found["computed"][1]):
        assert other_loss == loss
        assert gradients
        assert all(torch.equal(others[name], value) for name, value in gradients.items())
    assert found["off"][0][0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow("several runs")
def test_a_stopped_run_continues_to_the_same_bits(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(KEPT)
    path = Path(config.run.output_dir) / "adapter" / "adapter_model.safetensors"
    train(config)
    assert "image cache: on, 2 GiB in memory and 0 GiB on disk" in capsys.readouterr().err
    expected = load_file(path)
    shutil.rmtree(config.run.output_dir)

    def die(learner: Any, batches: Any, count: int, number: int, norm: float | None) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return train_step(learner, batches, count, number, norm)

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow("a run, evaluated twice")
def test_retrieval_is_that_of_pixels(make: Make, tmp_path: Path) -> None:
    train(make(KEPT))
    options = RetrievalOptions(tmp_path / "run", "base", (str(tmp_path / "data" / "pairs.jsonl"),))
    found = {name: retrieval_figures(make(cache), options)[0] for name, cache in (("kept", KEPT), ("off", OFF))}
    assert json.dumps(found["kept"]["query_to_document"]["mrr"]) == json.dumps(found["off"]["query_to_document"]["mrr"])


def test_the_vision_tower_costs_nothing_after_the_first_epoch(make: Make) -> None:
    kept, off = (learner_of(make(cache), Exchange(1), 0) for cache in (KEPT, OFF))
    assert kept.cuts.passes(1) == off.cuts.passes(1) == off.cuts.passes(2) == Passes(3.0, 1.0)
    assert kept.cuts.passes(2) == Passes(3.0, 0.0)
    visual = kept.model.get_base_model().model.visual
    sizes = sum(p.numel() for name, p in visual.named_parameters() if p.ndim >= 2 and not name.startswith("merger"))
    merger = sum(p.numel() for name, p in visual.named_parameters() if p.ndim >= 2 and name.startswith("merger"))
    items = [item for item in kept.items if item.encoded.images]
    assert len(items) == NUM_IMAGES
    for item in items:
        (span,) = item.encoded.images
        assert item.image_cost == span.num_placeholders * (4 * sizes + merger)
    difference = kept.cuts.of(1).operations - kept.cuts.of(2).operations
    assert difference == pytest.approx(2 * sum(item.image_cost for item in items))


@pytest.mark.slow("the memory of a run is predicted")
def test_the_plan_counts_the_features(make: Make) -> None:
    found = pair_figures(make({"memory_gib": 1.0, "disk_gib": 1.0}), "cpu", False, [1], QUIET)
    without = pair_figures(make(OFF), "cpu", False, [1], QUIET)
    learner = learner_of(make(OFF), Exchange(1), 0)
    num_placeholders = sum(span.num_placeholders for item in learner.items for span in item.encoded.images)
    expected = num_placeholders * 128 * 4  # the width of the language model, float32
    assert found["disk"]["image_features"] == found["disk"]["image_features_on_disk"] == expected
    assert without["disk"]["image_features"] == 0
    assert found["time"]["operations"] < without["time"]["operations"]
    assert any("image features (run.image_cache.disk_gib)" in text for _, text in pair_lines(found))
    assert not any("image features" in text for _, text in pair_lines(without))
    assert "peak" in found["cpu_memory"]
