"""The scores of every answer: which tokens are whose, whatever the cut, the processes and the order."""

import dataclasses
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Batch
from mmtrain.progress import QUIET, Progress
from mmtrain.scoring.packing import choose_packing
from mmtrain.scoring.scorer import Scorer
from mmtrain.scoring.scores import Scores
from mmtrain.train.step import Learner
from support.learning import learner_for

Row = tuple[int, int, int, bool, float, int, int, int]


def by_id(compute: Any, head_kind: str, inputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Stands for a model: a token's loss is a hundredth of its id, and even ids are the likeliest."""
    ids = batch.input_ids[batch.supervised]
    return ids.float() / 100, ids % 2 == 0


def expected_rows(dataset: Any, numbers: list[int]) -> list[Row]:
    """From the stored ids and the conversations alone; an answer is a run of supervised tokens."""
    rows: list[Row] = []
    for number in numbers:
        encoded, conversation = dataset.train.encoded(number), dataset.train.records.conversation(number)
        runs: list[list[int]] = []
        for i, (id_, on) in enumerate(zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True)):
            if on and (i == 0 or not encoded.supervised[i - 1]):
                runs.append([])
            if on:
                runs[-1].append(id_)
        replies = [message.text for message in conversation.messages if message.role == "assistant"]
        for answer, (run, reply) in enumerate(zip(runs, replies, strict=True), start=1):
            right = sum(id_ % 2 == 0 for id_ in run)
            size = len(reply.encode("utf-8"))
            rows.append((number, 0, answer, bool(conversation.images), sum(run) / 100, len(run), right, size))
    return rows


def rows_of(scores: Scores) -> list[Row]:
    columns = [getattr(scores, field.name).tolist() for field in fields(scores) if field.name != "weight"]
    return list(zip(*columns, strict=True))


class Process:
    """One of several processes, which does not meet the others."""

    def __init__(self, runtime: Any, index: int, num_processes: int, signal: int | None = None) -> None:
        self._runtime, self.index, self.num_processes, self._signal = runtime, index, num_processes, signal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def agree(self, values: Tensor) -> tuple[Tensor, int | None]:
        return values, self._signal


def score(learner: Learner, dataset: Any, numbers: list[int], runtime: Any, packing: bool = True) -> Scores | None:
    lengths = dataset.checked.num_tokens[numbers].tolist()
    scorer = Scorer(dataset.train, dataset.encoder, np.array(numbers), lengths)
    loaded = dataclasses.replace(learner, root=by_id, runtime=runtime, packing=packing)  # type: ignore[arg-type]
    return scorer.score(loaded, 120, QUIET)


@pytest.fixture
def made(make_config: Callable[..., Config]) -> tuple[Learner, Any]:
    return learner_for(make_config("text"))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("numbers", [list(range(8)), [2, 6, 7]])
def test_every_answer_has_the_sums_of_its_own_tokens(
    packing: bool, numbers: list[int], made: tuple[Learner, Any]
) -> None:
    learner, dataset = made
    expected = expected_rows(dataset, numbers)
    assert max(row[2] for row in expected) == 3
    found = score(learner, dataset, numbers, learner.runtime, packing=packing)
    assert found is not None
    for row, other in zip(rows_of(found), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-6)


def test_processes_share_the_samples(made: tuple[Learner, Any]) -> None:
    """Each answer is scored by one of them, and by that one as a whole."""
    learner, dataset = made
    expected = expected_rows(dataset, list(range(8)))
    shares = [score(learner, dataset, list(range(8)), Process(learner.runtime, n, 2)) for n in range(2)]
    counts = np.array([share.num_supervised for share in shares if share is not None])
    assert counts.sum(0).tolist() == [row[5] for row in expected]
    assert ((counts > 0).sum(0) == 1).all()
    assert (counts > 0).any(1).all()
    assert sum(share.nll for share in shares if share is not None) == pytest.approx([row[4] for row in expected])


def test_every_micro_batch_ticks_the_watchdog(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    ticks: list[int] = []
    scorer = Scorer(dataset.train, dataset.encoder, np.arange(8), dataset.checked.num_tokens.tolist())
    loaded = dataclasses.replace(learner, root=by_id)  # type: ignore[arg-type]
    assert scorer.score(loaded, 1, Progress(lambda: ticks.append(1), quiet=True)) is not None
    assert len(ticks) == 8  # one token is too few for any two samples


def test_a_signal_leaves_no_scores(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    assert score(learner, dataset, [0, 1], Process(learner.runtime, 0, 1, signal=15)) is None


def test_scores_of_some_samples_are_their_rows() -> None:
    ints, floats = np.array([1, 1, 4, 9]), np.array([0.5, 1.5, 2.5, 3.5])
    scores = Scores(ints, ints * 0, ints * 2, ints > 1, floats, ints * 3, ints * 4, ints * 5, floats)
    found = scores.of(np.array([9, 1, 2]))
    assert rows_of(found) == [
        (1, 0, 2, False, 0.5, 3, 4, 5),
        (1, 0, 2, False, 1.5, 3, 4, 5),
        (9, 0, 18, True, 3.5, 27, 36, 45),
    ]
    assert found.weight.tolist() == [0.5, 1.5, 3.5]


@pytest.mark.parametrize(
    ("wanted", "fault", "packs"),
    [("auto", None, True), (True, None, True), (False, None, False), ("auto", "it leaks", False)],
)
def test_packing_is_what_the_config_and_the_trial_say(
    wanted: Any, fault: str | None, packs: bool, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is of packed rows unless these are not wanted."""
    asked: list[Any] = []

    def trial(model: Any, processor: Any, dtype: torch.dtype, packing: bool) -> str | None:
        asked.append((model, processor, dtype, packing))
        return fault

    monkeypatch.setattr("mmtrain.scoring.packing.packing_fault", trial)
    first: Any = type("First", (), {"from_first": staticmethod(lambda key, make: make())})
    model, processor, lines = Any, Any, list[str]()
    assert choose_packing(model, processor, make_config("text", packing=wanted), first, lines.append) is packs  # type: ignore[arg-type]
    assert asked == [(model, processor, torch.float32, wanted is not False)]
    assert lines == ([] if fault is None else [f"packing: off, {fault}"])
