"""Law 1 for pairs: loss and gradients do not depend on micro-batches, blocks, kept graphs, processes or dropout."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.runtime.activity import IN_STEPS, Activity
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.contrastive.graphs import GraphMemory
from mmtrain.train.contrastive.step import ContrastiveLearner, accumulate_gradients
from support.builders import TINY
from support.pair_data import FULL, Exchange, in_threads, learner_of, pair_config, write_pairs
from support.tower_models import TOWERS

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
ALL_LORA = dict.fromkeys(("vision", "projector", "language"), LORA)
STEP = 2
GIB = 2**30
Found = tuple[float, dict[str, Tensor]]
slow = pytest.mark.slow("more combinations of the same")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("towers")

    def path_of(name: str) -> Path:
        return folder / name if (folder / name).exists() else TOWERS[name](folder / name)

    return path_of


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def make(towers: Callable[[str], Path], pairs: Path, tmp_path: Path) -> Callable[..., Config]:
    def made(name: str = "clip", **sections: Any) -> Config:
        return pair_config(towers(name), pairs, tmp_path / "run", **sections)

    return made


def gradients_of(learner: ContrastiveLearner) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trainable_parameters(learner.model).items() if p.grad is not None}


def step_of(config: Config, processes: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Found:
    """The loss and the gradients of a step, which are the same in all processes."""
    exchange, found = Exchange(processes), dict[int, Found]()
    learners = [learner_of(config, exchange, index, dtype) for index in range(processes)]

    def work(index: int) -> None:
        learner = dataclasses.replace(learners[index], **changes)
        loaded = {own: learner.load(own) for own in learner.cuts.of(STEP).own if own}
        batches: Iterator[Any] = (loaded[own] if own else None for own in learner.cuts.of(STEP).own)
        loss, _ = accumulate_gradients(learner, batches, STEP)
        found[index] = float(loss), gradients_of(learner)

    in_threads(work, processes)
    for loss, gradients in found.values():
        assert loss == found[0][0]
        assert all(torch.equal(gradients[name], value) for name, value in found[0][1].items())
    return found[0]


def dense(config: Config, dtype: torch.dtype = torch.float32) -> Found:
    """One forward of all images and all texts by the model's own modules, each sample on its own with its repetitions,
    and autograd.

    Items are distinguished by nothing but their content, read from the file anew.
    """
    config = config.model_copy(update={"run": config.run.model_copy(update={"kernels": "off"})})
    learner = learner_of(config, Exchange(1), 0, dtype)
    embedder, items = learner.embedder, learner.items
    samples = learner.cuts.of(STEP).samples
    pairs = [(index, learner.cuts._samples.pairs[index]) for index in samples]
    numbers = {
        "image": sorted({pair.query for _, pair in pairs}),
        "text": sorted({number for _, pair in pairs for number in pair.positives}),
    }
    found = {}
    for side, own in numbers.items():
        batch = embedder.batch([items[number] for number in own])
        with learner.dropout.at(STEP, batch):
            found[side] = F.normalize(embedder.embed(batch, items[own[0]].kind), dim=1)
    scale, bias = (
        torch.as_tensor(one.constant) if one.parameter is None else one.parameter
        for one in (embedder.scale, embedder.bias)
    )
    if embedder.scale.parameter is not None:
        scale = scale.exp() if embedder.scale.form == "exponent" else 1 / scale
    logits = scale * found["image"] @ found["text"].T + bias
    partners = {(pair.query, number) for _, pair in pairs for number in pair.positives}
    negative = torch.tensor([[(q, d) not in partners for d in numbers["text"]] for q in numbers["image"]])
    total = torch.zeros((), dtype=logits.dtype)
    for _, pair in pairs:
        row = numbers["image"].index(pair.query)
        for number in pair.positives:
            column = numbers["text"].index(number)
            positive = logits[row, column]
            if config.objective.loss == "sigmoid":
                one = F.softplus(-positive)
            else:
                across = F.softplus(logits[row][negative[row]].logsumexp(0) - positive)
                down = F.softplus(logits[:, column][negative[:, column]].logsumexp(0) - positive)
                one = (across + down) / 2 if embedder.symmetric else across
            total = total + one / len(pair.positives)
    if config.objective.loss == "sigmoid":
        total = total + F.softplus(logits[negative]).sum()
    total = total / len(pairs)
    torch.autograd.backward(total)
    named = trainable_parameters(learner.model)
    return float(total.detach()), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


def assert_equal(found: Found, expected: Found, gradient: float = 2e-6, loss: float = 1e-6) -> None:
    """Scale and bias on their own: their gradients are small sums of large numbers."""
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert found[1].keys() == expected[1].keys()
    numbers = {name for name, value in expected[1].items() if value.numel() == 1}
    for names in (found[1].keys() - numbers, *({name} for name in numbers)):
        difference = sum(float((found[1][n] - expected[1][n]).double().square().sum()) for n in names) ** 0.5
        norm = sum(float(expected[1][n].double().square().sum()) for n in names) ** 0.5
        assert difference <= gradient * norm, (names if len(names) == 1 else "weights", difference / norm)


SIZES = [1, 300, 10**6]
"""Tokens of a micro-batch: one item, some, all of the step."""


@pytest.mark.parametrize("microbatches", ["auto", 2])
def test_a_signal_in_any_phase_of_a_step_is_answered_by_saving(
    microbatches: Any, make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor ends a run at once in a phase that it does not know as one of a step."""
    phases: list[str] = []
    monkeypatch.setattr(Activity, "set", lambda self, phase, step=None: phases.append(phase))
    step_of(make(run={"microbatches": microbatches, "graph_memory_gib": 0.0}))
    assert {"forward", "backward", "gradients"} == set(phases) <= IN_STEPS


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
@pytest.mark.parametrize("tokens", SIZES)
def test_no_cut_changes_the_gradients(tokens: int, processes: int, make: Callable[..., Config]) -> None:
    run = {"microbatch_tokens": tokens, "graph_memory_gib": 0.0}
    assert_equal(step_of(make(run=run), processes), dense(make()))


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=slow)])
@pytest.mark.parametrize("tokens", [1, 300])
def test_no_cut_changes_the_gradients_with_dropout(tokens: int, processes: int, make: Callable[..., Config]) -> None:
    tune = {name: {**LORA, "dropout": 0.1} for name in ALL_LORA}
    sections = {"tune": tune, "objective": {"scale": 20.0}}
    expected = dense(make(**sections))
    run = {"microbatch_tokens": tokens, "graph_memory_gib": 0.0}
    assert_equal(step_of(make(**sections, run=run), processes), expected)
    without = dense(make(tune=ALL_LORA, objective={"scale": 20.0}))
    assert abs(without[0] - expected[0]) > 1e-5 * expected[0]  # dropout does something: 1e-3, and rounding 4e-7


@pytest.mark.slow("steps under many settings")
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_kept_graphs_give_the_same_bits(share: float, tokens: int, make: Callable[..., Config]) -> None:
    tune = {name: {**LORA, "dropout": 0.1} for name in ALL_LORA}
    config = make(tune=tune, objective={"scale": "fixed"}, run={"microbatch_tokens": tokens})
    expected = step_of(config, graph_memory=graphs(config, 0))
    every = graphs(config, GIB)
    step_of(config, graph_memory=every)
    room = every.used
    some = graphs(config, share * room)
    found = step_of(config, graph_memory=some)
    assert (0 < some.num_kept < every.num_kept) if share < 1 else some.num_kept == every.num_kept
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def graphs(config: Config, num_bytes: float) -> GraphMemory:
    return GraphMemory(learner_of(config, Exchange(1), 0).model, num_bytes)


def test_activations_that_are_computed_again_give_the_same_gradients(make: Callable[..., Config]) -> None:
    assert_equal(step_of(make(run={"activation_checkpointing": True})), dense(make()))


@pytest.mark.parametrize("block", [1, 5, 64])
def test_no_block_of_the_loss_changes_the_gradients(block: int, make: Callable[..., Config]) -> None:
    config = make()
    expected = dense(config)
    settings = dataclasses.replace(learner_of(config, Exchange(1), 0).loss, block=block)
    assert_equal(step_of(config, loss=settings), expected)


@pytest.mark.parametrize("processes", [1, 3])
def test_in_float64_the_gradients_are_those_of_one_pass(processes: int, make: Callable[..., Config]) -> None:
    config = make(run={"microbatch_tokens": 50})
    found = step_of(config, processes, torch.float64)
    assert_equal(found, dense(config, torch.float64), 1e-12, 1e-12)


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_fixed_number_of_micro_batches_gives_the_same_bits(processes: int, make: Callable[..., Config]) -> None:
    config = make(run={"microbatches": 4, "microbatch_tokens": 100})
    one, several = step_of(config), step_of(config, processes)
    assert one[0] == several[0]
    assert all(torch.equal(several[1][name], value) for name, value in one[1].items())
    assert_equal(one, dense(config))


@pytest.mark.parametrize("name", ["clip", *(pytest.param(n, marks=slow) for n in TOWERS if n != "clip")])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_every_family_and_loss(name: str, loss: str, make: Callable[..., Config]) -> None:
    objective: dict[str, Any] = {"loss": loss}
    if loss == "sigmoid" and not name.startswith("siglip"):
        objective["bias"] = -10.0
    config = make(name, objective=objective, run={"microbatch_tokens": 100})
    plain = make(name, objective=objective, run={"microbatch_tokens": 100, "kernels": "off"})
    expected = dense(config)
    # random weights without the norms' own statistics grow with every layer, and rounding with them
    tolerance = 1e-5 if name == "align" else 2e-6
    assert_equal(step_of(plain, 2), expected, tolerance)
    # kernels round differently, and the gradient of the scale is a small sum of large numbers: measured 2.6e-6
    assert_equal(step_of(config, 2), expected, max(tolerance, 5e-6))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_tower_is_computed_once(processes: int, make: Callable[..., Config]) -> None:
    tune = {**FULL, "vision": {"mode": "frozen"}, "projector": {"mode": "frozen"}}
    config = make(tune=tune)
    learner = learner_of(config, Exchange(1), 0)
    embedded: list[str] = []
    embed = learner.embedder.embed

    def watched(batch: Any, kind: str) -> Tensor:
        embedded.extend([kind] * len(batch.segments))
        return embed(batch, kind)

    learner.embedder.embed = watched  # type: ignore[method-assign]
    for _ in range(2):
        learner.optimizer.zero_grad(set_to_none=True)
        loss, _ = accumulate_gradients(learner, (learner.load(own) for own in learner.cuts.of(STEP).own), STEP)
    kinds = [learner.items[number].kind for number in learner.cuts.of(STEP).items]
    assert embedded.count("image") == kinds.count("image") > 10
    assert_equal((float(loss), gradients_of(learner)), dense(config))
    assert_equal(step_of(config, processes), dense(config))


@pytest.mark.slow("steps of a large model in float64")
@pytest.mark.parametrize(
    ("pooling", "packing", "processes"),
    [("last", "auto", 1), ("mean", "auto", 3), ("last", False, 3), ("mean", False, 1)],
)
def test_a_vision_language_model_as_an_embedder(
    pooling: str, packing: bool | str, processes: int, pairs: Path, tmp_path: Path
) -> None:
    """In float64: prompts have so much in common that the cosines are near 1, and rounding counts for more."""
    tune = {"language": {**LORA, "dropout": 0.1}, "vision": LORA}
    sections: dict[str, Any] = {"tune": tune, "objective": {"pooling": pooling, "scale": 20.0}}
    one = pair_config(TINY, pairs, tmp_path / "run", **sections, run={"packing": packing})
    cut = {"packing": packing, "microbatch_tokens": 200, "graph_memory_gib": 0.0, "kernels": "off"}
    found = step_of(pair_config(TINY, pairs, tmp_path / "run", **sections, run=cut), processes, torch.float64)
    assert_equal(found, dense(one, torch.float64), 1e-9, 1e-9)
