"""One step: the clipped update, what is refused before it, and which gradients are summed."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.errors import DeviceMemoryError, NonFiniteError
from mmtrain.runtime.activity import IN_STEPS, Activity
from mmtrain.train.gradients import branch_of, flatten, is_exact, put_back, sum_running, sum_tree
from mmtrain.train.step import Learner, accumulate_gradients, train_step
from support.learning import LORA, learner_for, relative_l2, step_of

SAMPLES = [0, 1, 4, 5]
TUNE = {"language": {**LORA, "dropout": 0.2}}
Made = tuple[Learner, Any]


@pytest.fixture
def made(make_config: Callable[..., Config]) -> Made:
    """A text model with dropout, whose optimizer subtracts the gradient as it is."""
    learner, dataset = learner_for(make_config("text", TUNE))
    sgd = torch.optim.SGD([p for p in learner.model.parameters() if p.requires_grad], lr=1.0)
    return dataclasses.replace(learner, optimizer=sgd), dataset


def batches(made: Made) -> Any:
    dataset = made[1]
    return Loader(dataset.train, dataset.encoder.processor, packing=True).batches([SAMPLES])


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters() if p.requires_grad}


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


@pytest.mark.parametrize("share_kept", [0.25, 0.5, 2.0, None])
def test_the_update_is_the_gradient_clipped_to_the_norm(made: Made, share_kept: float | None) -> None:
    """Of the sum over tokens and not their mean, so that the norm is far from 1."""
    learner, dataset = made
    count = int(dataset.checked.num_supervised[SAMPLES].sum())
    mean_loss, mean = step_of(*made, [SAMPLES], packing=True)
    norm = count * norm_of(mean)
    assert norm > 8
    learner.optimizer.zero_grad(set_to_none=True)
    before = weights(learner)
    result = train_step(learner, batches(made), 1, 3, None if share_kept is None else share_kept * norm)
    after = weights(learner)
    assert result.loss == pytest.approx(count * mean_loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping
    factor = count * min(1.0, share_kept or 1.0)
    expected = {name: -factor * value for name, value in mean.items()}
    assert relative_l2({name: after[name] - before[name] for name in before}, expected) < 1e-5
    assert all(p.grad is None for p in learner.model.parameters())  # the next step begins at zero


def test_a_gradient_that_is_not_finite_changes_no_weight(made: Made) -> None:
    """The loss alone is finite here."""
    learner, _ = made
    parameter = next(p for p in learner.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights(learner)
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is \d+\.\d+ and .*norm (nan|inf)"):
        train_step(learner, batches(made), 10, 7, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())


def test_a_loss_that_is_not_finite_changes_no_weight(made: Made) -> None:
    """The gradient alone is finite here: infinity is added to the loss."""
    learner, _ = made

    def infinite(*args: Any) -> Any:
        nll, right = learner.root(*args)
        return nll + math.inf, right

    root: Any = infinite
    before = weights(learner)
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is inf and .*norm \d+\.\d+"):
        train_step(dataclasses.replace(learner, root=root), batches(made), 10, 7, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())


@pytest.mark.parametrize(
    ("full", "message"),
    [
        (
            "forward",
            r"^step 7, a micro-batch of \d+ tokens and 0 images: out of .*: lower run\.microbatch_tokens",
        ),
        ("update", r"^step 7, the update: out of memory.*: train fewer weights, or set run\.weights to shard$"),
    ],
)
def test_a_full_device_is_reported_with_what_was_being_done(
    full: str, message: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    learner, _ = made
    if full == "forward":
        root: Any = fail
        learner = dataclasses.replace(learner, root=root)
    else:
        monkeypatch.setattr(learner.optimizer, "step", fail)
    with pytest.raises(DeviceMemoryError, match=message):
        train_step(learner, batches(made), 10, 7, 1.0)


def test_dropout_follows_the_step(made: Made) -> None:
    def gradients(step: int) -> dict[str, Tensor]:
        learner, _ = made
        learner.optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(learner, batches(made), 10, step)
        return {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}

    first = gradients(1)
    assert relative_l2(gradients(1), first) == 0
    assert relative_l2(gradients(2), first) > 0.05
    assert relative_l2(gradients(0), first) > 0.05


class TwoAlike:
    """A runtime of two processes with equal values; the rest is that of one. A signal asked both to stop."""

    num_processes = 2

    def __init__(self, alone: Any) -> None:
        self._alone = alone
        self.agreed: list[int] = []
        """How many values at each call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._alone, name)

    def sum(self, values: Tensor) -> Tensor:
        return 2 * values

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack([values, values])

    def agree(self, values: Tensor) -> tuple[Tensor, int | None]:
        self.agreed.append(len(values))
        return 2 * values, 15


@pytest.mark.parametrize(
    ("settings", "times"), [({}, 2), ({"exact": True}, 2), ({"sharded": True}, 1)], ids=["running", "tree", "sharded"]
)
def test_gradients_are_summed_over_processes_once(made: Made, settings: dict[str, Any], times: int) -> None:
    """Where weights are sharded the backward pass sums them. The loss is summed in any case."""
    learner, dataset = made
    loss, alone = step_of(*made, [SAMPLES], packing=True)
    two: Any = TwoAlike(learner.runtime)
    found = dataclasses.replace(learner, runtime=two, **settings)
    together, gradients = step_of(found, dataset, [SAMPLES], packing=True)
    assert together == pytest.approx(2 * loss, rel=1e-6)
    assert relative_l2(gradients, {name: times * value for name, value in alone.items()}) < 1e-6
    assert two.agreed == [0 if found.exact else 1]  # the tree adds the losses, too, in its own order
    found.optimizer.zero_grad(set_to_none=True)
    assert train_step(found, batches(made), 10, 1, 1.0).stop_signal == 15


@pytest.mark.parametrize("exact", [False, True])
def test_the_micro_batches_of_a_step_are_summed_in_any_way(made: Made, exact: bool) -> None:
    """None is a micro-batch without a sample: some process has no more of them."""
    learner, dataset = made
    loss, expected = step_of(*made, [SAMPLES], packing=True)
    learner.optimizer.zero_grad(set_to_none=True)
    cuts = [[0], [4, 1], [5]]
    of_cut: list[Any] = [*Loader(dataset.train, dataset.encoder.processor, packing=True).batches(cuts), None]
    count = int(dataset.checked.num_supervised[SAMPLES].sum())
    found, signum = accumulate_gradients(dataclasses.replace(learner, exact=exact), of_cut, count, step=3)
    gradients = {n: p.grad for n, p in learner.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert float(found) == pytest.approx(loss, rel=1e-6)
    assert signum is None
    assert relative_l2(gradients, expected) < 1e-5


def test_a_process_without_a_micro_batch_has_no_loss_and_zero_gradients(made: Made) -> None:
    learner, _ = made
    total, _ = accumulate_gradients(learner, [], 10, step=1)
    assert (total.shape, total.dtype, float(total)) == ((), torch.float64, 0.0)
    learning = [p for p in learner.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in learning)


@pytest.mark.parametrize("exact", [False, True])
def test_the_phases_of_a_step_are_known(made: Made, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in `gradients` is not the one that hangs, and a signal in any of the phases is answered by saving."""
    phases: list[str] = []
    monkeypatch.setattr(Activity, "set", lambda self, phase, step=None: phases.append(phase))
    learner, dataset = made
    of_cut = Loader(dataset.train, dataset.encoder.processor, packing=True).batches([[0], [4]])
    train_step(dataclasses.replace(learner, exact=exact), of_cut, 10, 1, 1.0)
    assert phases == ["forward", "forward", "gradients", "update"]
    assert set(phases) <= IN_STEPS


def parameters() -> list[nn.Parameter]:
    """Of shapes (2,), (1, 3) and (2,); the second has no gradient."""
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 3), (2,))]
    made[0].grad, made[2].grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    return made


@pytest.mark.parametrize("processes", [1, 3])
def test_a_missing_gradient_is_zero(processes: int) -> None:
    several: Any = SimpleNamespace(num_processes=processes, sum=lambda values: processes * values)
    found = parameters()
    assert flatten(found).tolist() == [1, 2, 0, 0, 0, 3, 4]
    sum_running(found, several)
    expected = [[1, 2], [[0, 0, 0]], [3, 4]]
    assert [p.grad.tolist() for p in found if p.grad is not None] == [
        (torch.tensor(values) * processes).tolist() for values in expected
    ]


def test_gradients_are_put_back_in_their_shapes() -> None:
    found = parameters()
    put_back(torch.arange(7.0), found)
    assert [p.grad.tolist() for p in found if p.grad is not None] == [[0, 1], [[2, 3, 4]], [5, 6]]


def test_the_tree_adds_halves_of_halves() -> None:
    """Numbers whose sum in float32 shows the order: 1 is lost next to 2 ** 24, and 2 is not."""
    big = 2.0**24
    leaves = torch.tensor([[1.0], [big], [1.0], [1.0], [-big]])
    one: Any = SimpleNamespace(num_processes=1)
    remaining = iter(leaves.clone())
    # (1 + big) + (1 + (1 - big)): the first 1 is lost, big - (big - 2) is left
    assert sum_tree(5, lambda: next(remaining), one).tolist() == branch_of(leaves).tolist() == [2.0]


def test_the_tree_is_the_same_on_powers_of_two_that_divide_the_micro_batches() -> None:
    found = {(n, processes) for n in (4, 6, 12) for processes in range(1, 13) if is_exact(n, processes)}
    assert found == {(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (12, 1), (12, 2), (12, 4)}
