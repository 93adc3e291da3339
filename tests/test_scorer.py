"""The scores of every answer: which tokens are whose, whatever the cut, the processes and the order."""

import dataclasses
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Batch, Loader
from mmtrain.errors import DeviceMemoryError, UserError
from mmtrain.model.packing_trial import RowsFound
from mmtrain.progress import QUIET, Progress
from mmtrain.scoring.packing import RowChoice, choose_rows
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


def cuts_of(
    learner: Learner, dataset: Any, alone: bool, packing: bool, limit: int, index: int = 0, count: int = 1
) -> list[list[int]]:
    """The samples of each micro-batch that a process scores."""
    scorer = Scorer(dataset.train, dataset.encoder, np.arange(8), dataset.checked.num_tokens.tolist())
    seen: list[list[int]] = []

    def batches(samples: Any, own: list[list[int]]) -> Any:
        seen.extend(list(one) for one in own)
        return iter(())

    runtime: Any = Process(learner.runtime, index, count)
    loaded = SimpleNamespace(runtime=runtime, alone=alone, packing=packing, batches=batches)
    assert scorer.score(loaded, limit, QUIET) is not None  # type: ignore[arg-type]
    return seen


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


@pytest.mark.parametrize("packing", [True, False])
def test_a_micro_batch_has_as_many_tokens_as_fit(packing: bool, made: tuple[Learner, Any]) -> None:
    """Packed the tokens of its samples count; padded, the longest one once for each sample."""
    learner, dataset = made
    lengths = dataset.checked.num_tokens.tolist()
    cuts = cuts_of(learner, dataset, False, packing, 120)
    assert sorted(index for cut in cuts for index in cut) == list(range(8))
    sizes = [[lengths[i] for i in cut] for cut in cuts]
    assert max(len(cut) for cut in cuts) > 1
    assert all(len(size) == 1 or (sum(size) if packing else len(size) * max(size)) <= 120 for size in sizes)
    assert packing or cuts != cuts_of(learner, dataset, False, True, 120)


def test_samples_that_go_through_the_model_alone_are_scored_one_by_one(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    cuts = cuts_of(learner, dataset, True, False, 10_000)
    assert sorted(cuts) == [[number] for number in range(8)]


def test_a_process_without_a_sample_has_no_scores(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    found = score(learner, dataset, [5], Process(learner.runtime, 1, 2))
    assert found is not None
    assert not found.num_supervised.any()


def test_a_batch_without_a_supervised_token_has_no_answer(made: tuple[Learner, Any]) -> None:
    """What a process computes only because others do has weight 0; samples that come after it keep their answers."""
    learner, dataset = made
    scorer = Scorer(dataset.train, dataset.encoder, np.arange(8), dataset.checked.num_tokens.tolist())
    loader = Loader(dataset.train, learner.processor, packing=True)
    batch = loader.load([1, 2])
    first = batch.segments[0]
    only_second, none = batch.supervised.clone(), torch.zeros_like(batch.supervised)
    only_second[first.row, first.start : first.start + first.length] = False
    expected = scorer._answers(loader.load([2]))
    assert scorer._answers(dataclasses.replace(batch, supervised=only_second)).tolist() == expected.tolist()
    found = scorer._answers(dataclasses.replace(batch, supervised=none))
    assert found.shape == (0,)
    assert found.dtype == np.dtype(np.int64)


def test_a_sample_that_is_supervised_from_its_first_token_has_an_answer(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    scorer = Scorer(dataset.train, dataset.encoder, np.array([2]), [int(dataset.checked.num_tokens[2])])
    batch = Loader(dataset.train, learner.processor, packing=True).load([2])
    supervised = torch.zeros_like(batch.supervised)
    supervised[0, :3] = True
    assert scorer._answers(dataclasses.replace(batch, supervised=supervised)).tolist() == [0, 0, 0]


def test_changed_samples_are_what_the_model_is_given(made: tuple[Learner, Any]) -> None:
    learner, dataset = made
    given: list[Any] = []

    def batches(samples: Any, own: list[list[int]]) -> Any:
        given.append(samples)
        return iter(())

    changed: Any = object()
    scorer = Scorer(dataset.train, dataset.encoder, np.array([2]), [10], changed)
    loaded: Any = SimpleNamespace(
        runtime=learner.runtime,
        alone=False,
        packing=True,
        batches=batches,
    )
    scorer.score(loaded, 120, QUIET)
    assert given == [changed]


def test_a_full_device_is_reported_with_the_micro_batch(made: tuple[Learner, Any]) -> None:
    learner, dataset = made

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    full: Any = fail
    scorer = Scorer(dataset.train, dataset.encoder, np.array([2]), [int(dataset.checked.num_tokens[2])])
    with pytest.raises(DeviceMemoryError, match=r"^evaluation, a micro-batch of [\d,]+ tokens and 0 images: out of"):
        scorer.score(dataclasses.replace(learner, root=full), 120, QUIET)


def test_samples_with_images_are_marked(make_config: Callable[..., Config]) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl"))
    found = score(learner, dataset, list(range(8)), learner.runtime)
    assert found is not None
    expected = [row[3] for row in expected_rows(dataset, list(range(8)))]
    assert found.has_image.tolist() == expected
    assert len(set(expected)) == 2


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
    ("wanted", "fault", "packs", "alone"),
    [
        ("auto", None, True, False),
        (True, None, True, False),
        (False, None, False, False),
        ("auto", "it leaks", False, False),
        ("auto", "one at a time", False, True),
        (False, "one at a time", False, True),
    ],
)
def test_packing_is_what_the_config_and_the_trial_say(
    wanted: Any,
    fault: str | None,
    packs: bool,
    alone: bool,
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial is of packed rows unless these are not wanted."""
    asked: list[Any] = []

    def trial(model: Any, processor: Any, dtype: torch.dtype, packing: bool, longest: int) -> RowsFound:
        asked.append((model, processor, dtype, packing, longest))
        return RowsFound(fault, alone)

    monkeypatch.setattr("mmtrain.scoring.packing.try_rows", trial)
    keys: list[str] = []

    def from_first(key: str, make: Callable[[], Any]) -> Any:
        keys.append(key)
        return make()

    first: Any = SimpleNamespace(from_first=from_first)
    model, processor, lines = Any, Any, list[str]()
    rows = choose_rows(model, processor, make_config("text", packing=wanted), first, lines.append)  # type: ignore[arg-type]
    assert rows == RowChoice(packs, alone)
    positions = 2048  # of the model, fewer than data.max_length
    assert asked == [(model, processor, torch.float32, wanted is not False, positions)]
    assert keys == ["packing"]
    assert lines == ([] if fault is None else [f"packing: off, {fault}"])


def test_packing_that_the_config_demands_is_refused_where_it_leaks(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtrain.scoring.packing.try_rows", lambda *args, **settings: RowsFound("it leaks"))
    first: Any = type("First", (), {"from_first": staticmethod(lambda key, make: make())})
    with pytest.raises(UserError) as caught:
        choose_rows(Any, Any, make_config("text", packing=True), first, lambda line: None)  # type: ignore[arg-type]
    assert str(caught.value) == "run.packing: it leaks; expected false or auto for this model"
