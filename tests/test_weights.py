"""Turns with a weight of their own: from the record to the loss of a step and the perplexity.

The reference is plain: full logits in float32, `cross_entropy` of every supervised token, times the weight of its turn,
summed and divided by the sum of the weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmtrain.config.data_section import TrainSource
from mmtrain.config.schema import Config
from mmtrain.inspect_labels.view import view_sample
from mmtrain.records.chat import SampleError
from mmtrain.records.formats import read_record
from mmtrain.scoring.scores import Scores
from mmtrain.scoring.statistics import by_image, difference, summary
from mmtrain.train.step_cuts import StepCuts
from support.builders import write_jsonl
from support.learning import learner_for, relative_l2, step_of

ASKED = {"role": "user", "content": "What is it?"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ROWS = [
    {"messages": [ASKED, said("A red circle.", weight=0.25), ASKED, said("A square.", weight=2)]},
    {"messages": [ASKED, said("Nothing at all.")]},
    {"messages": [ASKED, said("No.", loss=0), ASKED, said("It is blue.", loss_scale=3.5)]},
]
WEIGHTS = [(0.25, 2.0), (), (3.5,)]


@pytest.fixture
def config_of(make_config: Callable[..., Config], tmp_path: Path) -> Callable[[list[Any]], Config]:
    def make(rows: list[Any]) -> Config:
        path = write_jsonl(tmp_path / "weighted.jsonl", rows)
        config = make_config("text")
        return config.model_copy(
            update={"data": config.data.model_copy(update={"train": (TrainSource(path=str(path)),)})}
        )

    return make


def weight_of(turn: dict[str, Any]) -> float:
    message = read_record({"messages": [ASKED, turn]}).messages[1]
    return message.weight if message.train else 0.0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 1.0),
        ({"weight": 1}, 1.0),
        ({"weight": 0.5}, 0.5),
        ({"loss_weight": 2.5, "loss": True}, 2.5),
        ({"loss_scale": 0.0, "train": 0}, 0.0),
        ({"weight": 3, "loss_weight": 3.0}, 3.0),
        ({"training": True}, 1.0),
        ({"trainable": False}, 0.0),
    ],
)
def test_flags_and_weights_of_a_turn(flags: dict[str, Any], expected: float) -> None:
    assert weight_of(said("A", **flags)) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"weight": -0.5}, "'weight' must be a number from 0 to 1,000, not '-0.5'"),
        ({"loss_weight": 1001}, "must be a number from 0 to 1,000"),
        ({"weight": "high"}, "must be a number"),
        ({"weight": float("inf")}, "must be a number"),
        ({"loss": 0.5}, "'loss' must be true, false, 1 or 0"),
        ({"weight": 0.5, "loss": 0}, "contradict each other"),
        ({"weight": 0.5, "loss_scale": 0.25}, "contradict each other"),
        ({"mask": True}, "'mask' of turn 2 is not understood"),
    ],
)
def test_what_is_no_weight_is_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(SampleError, match=words):
        weight_of(said("A", **flags))


def test_the_stored_weights_are_those_of_the_record_and_are_shown(config_of: Callable[..., Config]) -> None:
    _, dataset = learner_for(config_of(ROWS))
    assert [dataset.train.encoded(index).weights for index in range(3)] == WEIGHTS
    counts = dataset.checked.num_supervised.tolist()
    first = view_sample(dataset.train, dataset.encoder, 0)
    runs = [(span.weight, span.end - span.start) for span in first.spans if span.supervised]
    by_turn = [sum(length for weight, length in runs if weight == wanted) for wanted in WEIGHTS[0]]
    assert sum(by_turn) == counts[0]
    expected = [0.25 * by_turn[0] + 2 * by_turn[1], counts[1], 3.5 * counts[2]]
    assert dataset.checked.sum_weights.tolist() == expected


@pytest.mark.parametrize("cuts", [[[0, 1, 2]], [[2], [0, 1]]], ids=["one", "two"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_weighted_sum_by_the_sum_of_weights(
    config_of: Callable[..., Config], cuts: list[list[int]], packing: bool
) -> None:
    learner, dataset = learner_for(config_of(ROWS))
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for index, weights in enumerate(([0.25, 2.0], [1.0], [3.5])):
        sample = dataset.train.encoded(index)
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        logits = learner.model(input_ids=ids, use_cache=False).logits[0].float()
        nll = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").double()
        turn = -1
        for position in range(1, ids.shape[1]):
            if sample.supervised[position]:
                turn += not sample.supervised[position - 1]
                total = total + weights[turn] * nll[position - 1]
                count += weights[turn]
    learner.model.zero_grad()
    torch.autograd.backward(total / count)
    expected = {
        n: p.grad.clone() for n, p in learner.model.named_parameters() if p.requires_grad and p.grad is not None
    }
    loss, gradients = step_of(learner, dataset, cuts, packing)
    assert loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    assert relative_l2(gradients, expected) < 1e-5


def test_a_step_divides_by_the_sum_of_the_weights_of_all_its_samples(config_of: Callable[..., Config]) -> None:
    config = config_of(ROWS)
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 3})})
    learner, dataset = learner_for(config)
    cut = StepCuts(dataset, learner, config.run).of(1)
    assert (cut.count, cut.figures["num_supervised"]) == (
        float(dataset.checked.sum_weights.sum()),
        int(dataset.checked.num_supervised.sum()),
    )


def test_a_weight_of_one_changes_no_bit(config_of: Callable[..., Config], tmp_path: Path) -> None:
    plain = [{"messages": [ASKED, said("A red circle."), ASKED, said("A square.")]}]
    found = []
    for rows in (
        plain,
        [{"messages": [{**turn, "weight": 1.0} if turn != ASKED else turn for turn in plain[0]["messages"]]}],
    ):
        learner, dataset = learner_for(config_of(rows))
        assert dataset.train.encoded(0).weights == ()
        found.append(step_of(learner, dataset, [[0]], True))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_the_perplexity_counts_a_token_as_much_as_its_weight() -> None:
    sample, tokens = np.array([0, 0, 1]), np.array([4, 1, 5])
    nll, weight, ones = np.array([2.0, 1.0, 12.0]), np.array([0.5, 4.0, 1.0]), np.ones(3, np.int64)
    scores = Scores(sample, sample * 0, np.array([1, 2, 1]), sample > 0, nll, tokens, ones, tokens, weight)
    found = summary(scores)
    assert found["nll"] == (1.0 + 4.0 + 12.0) / (2.0 + 4.0 + 5.0)
    assert found["sample_nll"] == pytest.approx(((1.0 + 4.0) / 6.0 + 12.0 / 5.0) / 2)
    assert found["bits_per_byte"] == pytest.approx(15 / np.log(2) / 10)
    assert (found["num_supervised"], found["token_accuracy"]) == (10, 0.3)
    assert by_image(scores)["text-only"]["nll"] == 5.0 / 6.0
    better = dataclasses.replace(scores, nll=nll - 0.5)
    assert difference(better, scores)["nats_per_token"] == pytest.approx(0.5 * 5.5 / 11)
