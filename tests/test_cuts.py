"""Law 1: a step is a set of samples. How it is cut, packed or padded changes neither loss nor gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.model.dropout import DropoutContext, SampleDropout
from support.learning import LORA, MIXED, learner_for, relative_l2, step_of

CUTS = {
    "1x8": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "8x1": [[7], [2], [0], [1], [6], [5], [4], [3]],
    "3+5": [[6, 1, 3], [0, 7, 2, 5, 4]],
}


def with_dropout(tune: dict[str, Any], dropout: float) -> dict[str, Any]:
    return {part: {**mode, "dropout": dropout} if mode["mode"] == "lora" else mode for part, mode in tune.items()}


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow("without dropout")), 0.1])
def test_no_cut_changes_loss_or_gradient(kind: str, dropout: float, make_config: Callable[..., Config]) -> None:
    tune = with_dropout(MIXED if kind != "text" else {"language": LORA}, dropout)
    learner, dataset = learner_for(make_config(kind, tune))
    found = {
        (name, packing): step_of(learner, dataset, cuts, packing)
        for name, cuts in CUTS.items()
        for packing in (True, False)
    }
    loss, gradients = found["1x8", True]
    for other_loss, other_gradients in found.values():
        assert abs(other_loss - loss) <= 1e-5 * loss
        assert relative_l2(other_gradients, gradients) <= 1e-5  # measured: at most 1e-6


def test_dropout_changes_the_gradient_and_follows_the_seed(make_config: Callable[..., Config]) -> None:
    """Without this, dropout that never happens would pass the test above."""
    plain = step_of(*learner_for(make_config("qwen2_5_vl", MIXED, seed=0)), CUTS["1x8"], True)[1]
    learner, dataset = learner_for(make_config("qwen2_5_vl", with_dropout(MIXED, 0.1), seed=0))
    gradients = {}
    for seed in (0, 1):
        learner.dropout._seed = seed
        gradients[seed] = step_of(learner, dataset, CUTS["1x8"], True)[1]
    assert relative_l2(gradients[0], plain) > 0.05
    assert relative_l2(gradients[1], gradients[0]) > 0.05


def test_dropout_drops_the_share_it_should_and_keeps_the_mean(make_config: Callable[..., Config]) -> None:
    _, dataset = learner_for(make_config("text", {"language": LORA}))
    batch = Loader(dataset.train, dataset.encoder.processor, True).load(list(range(8)))
    context = DropoutContext(0)
    dropout = SampleDropout(0.25, "layer", "language", None, context)
    ones = torch.ones(*batch.input_ids.shape, 256)
    assert torch.equal(dropout(ones), ones)  # off outside of `at`: evaluation has no dropout
    with context.at(1, batch):
        dropped = dropout(ones)
    assert torch.equal(dropout(ones), ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


def test_samples_of_a_packed_row_do_not_see_each_other(kind: str, make_config: Callable[..., Config]) -> None:
    """The loss of sample 5 alone is its share of the loss with any other sample before it."""
    learner, dataset = learner_for(make_config(kind))
    counts = dataset.checked.num_supervised
    alone = {number: step_of(learner, dataset, [[number]], True)[0] for number in (0, 3, 5)}
    for other in (0, 3):
        together, _ = step_of(learner, dataset, [[other, 5]], True)
        expected = (alone[other] * counts[other] + alone[5] * counts[5]) / (counts[other] + counts[5])
        assert together == pytest.approx(expected, rel=1e-5)


def test_what_fills_a_row_up_belongs_to_no_sample_and_changes_nothing(
    kind: str, make_config: Callable[..., Config]
) -> None:
    learner, dataset = learner_for(make_config(kind, {"language": LORA | {"dropout": 0.2}}))
    found, fillings = {}, {}
    for multiple in (1, 32, 500):
        batch = next(
            Loader(dataset.train, dataset.encoder.processor, packing=True, row_multiple=multiple).batches([[0, 3, 5]])
        )
        length = batch.input_ids.shape[1]
        assert length % multiple == 0
        fillings[multiple] = length - batch.num_tokens
        assert not batch.supervised[0, batch.num_tokens :].any()
        found[multiple] = step_of(learner, dataset, [[0, 3, 5]], packing=True, row_multiple=multiple)
    assert fillings[1] == 0 < fillings[32] < 32 < fillings[500]
    for loss, gradients in (found[32], found[500]):
        assert loss == pytest.approx(found[1][0], rel=1e-6)
        assert relative_l2(gradients, found[1][1]) < 1e-6  # measured: 4e-7
