"""The predicted memory of a contrastive run, compared with what torch's allocator reports while the same steps are
taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from mmtrain.config.schema import Config, Model
from mmtrain.contrastive.load import load_embedder
from mmtrain.model.load import load_without_weights
from mmtrain.model.without_values import TensorWithoutValues
from mmtrain.plan.pair_memory import predict_pair_peak
from mmtrain.progress import QUIET
from mmtrain.runtime.processes import Runtime
from mmtrain.train.contrastive.cuts import Microbatch
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.peak_memory import PeakMemory, counted_on, keeping_no_features
from mmtrain.train.step import train_step
from support.builders import TINY
from support.pair_data import FULL, Exchange, learner_of, pair_config, write_pairs
from support.tower_models import TOWERS

LORA = {"mode": "lora", "rank": 4}
ALL = 10**6
SLOW = pytest.mark.slow("a model is made twice, and run")
CASES = [
    pytest.param("clip", FULL, {}, {"kernels": "off", "microbatch_tokens": ALL}, 0.03, id="clip"),
    # the last MLPs, half of all here, are computed at pooled tokens only, which is not predicted
    pytest.param("clip", FULL, {}, {"microbatch_tokens": ALL}, 0.15, id="kernels", marks=SLOW),
    pytest.param(
        "clip",
        FULL,
        {},
        {"kernels": "off", "graph_memory_gib": 1.0, "microbatch_tokens": 150},
        0.05,
        id="kept",
        marks=SLOW,
    ),
    # its weights would be drawn until all are within bounds
    pytest.param(
        "siglip",
        {"language": LORA, "vision": LORA},
        {"scale": "fixed"},
        {"microbatch_tokens": ALL},
        0.03,
        id="siglip",
        marks=SLOW,
    ),
    pytest.param(
        "vlm",
        {"language": LORA},
        {"scale": 20.0, "pooling": "last"},
        {"microbatch_tokens": ALL},
        0.05,
        id="embedder",
        marks=SLOW,
    ),
]


def predicted(config: Config) -> PeakMemory:
    embedder = load_embedder(config, Runtime("float32", device="cpu"))
    return predict_pair_peak(config, PairDataset(config, embedder, QUIET), embedder, "cpu", QUIET)


def allocated(learner: ContrastiveLearner, steps: Callable[[], Any]) -> int:
    """The weights, and the most at once while `steps` is called, as the allocator reports it."""
    state = [*learner.model.parameters(), *learner.model.buffers()]
    weights = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in state}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += int(event.nbytes())
        peak = max(peak, live)
    assert peak > 0
    return int(peak + sum(weights.values()))


def measured(config: Config) -> int:
    """Two steps, with the micro-batches of the first one; with one, the second time twice."""
    learner = learner_of(config, Exchange(1), 0)
    own: list[Microbatch] = list(learner.cuts.of(1).own)

    def steps() -> None:
        for repeated in (1, 2):
            batches = (learner.load(one) for one in own * (1 if len(own) > 1 else repeated))
            train_step(learner, batches, 1.0, 1, config.train.max_grad_norm)

    return allocated(learner, steps)


@pytest.mark.slow("steps are measured")
@pytest.mark.parametrize(("name", "tune", "objective", "run", "tolerance"), CASES)
def test_the_prediction_is_what_is_allocated(
    name: str, tune: dict[str, Any], objective: dict[str, Any], run: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    model = TINY if name == "vlm" else TOWERS[name](tmp_path / name)
    run = {"graph_memory_gib": 0.0, **run}
    config = pair_config(model, write_pairs(tmp_path), tmp_path / "run", tune=tune, objective=objective, run=run)
    expected = measured(keeping_no_features(config))  # as where the image cache is full
    assert predicted(config).peak == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow("predicted three times")
def test_graphs_are_kept_within_their_budget(tmp_path: Path) -> None:
    model, pairs = TOWERS["clip"](tmp_path / "clip"), write_pairs(tmp_path)
    run = {"microbatch_tokens": 150}
    none, some, every = (
        predicted(pair_config(model, pairs, tmp_path / "run", run={**run, "graph_memory_gib": size}))
        for size in (0.0, 1e-4, 1.0)
    )
    assert (none.kept, some.kept) == (0, int(1e-4 * 2**30))
    assert every.kept > some.kept
    assert some.peak - none.peak == some.kept
    assert every.activations == none.activations


def test_weights_that_are_drawn_within_bounds_are_not_drawn(tmp_path: Path) -> None:
    """Without values every comparison is true, so drawing them again would never end. Tied weights stay tied."""
    path = TOWERS["siglip"](tmp_path / "siglip")
    with counted_on("cpu") as memory:
        model = load_without_weights(Model(path=str(path), dtype="float32"))
        assert memory.num_bytes >= sum(parameter.nbytes for parameter in model.parameters())
        chats = load_without_weights(Model(path=str(TINY), dtype="float32"))
        assert isinstance(model.vision_model.embeddings.patch_embedding.weight.data, TensorWithoutValues)
    assert chats.get_output_embeddings().weight is chats.get_input_embeddings().weight
