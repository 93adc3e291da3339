"""Whether a run may resume: what changed is named, refused or accepted, and written down."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.train.checkpoint import CheckpointFolder, Snapshot
from mmtrain.train.dataset import Dataset
from mmtrain.train.fingerprint import fingerprints
from mmtrain.train.resume import Resume, find_resume

HASHES = {"data.train.0.records": "aa", "model.weights": "bb"}


@dataclass
class Run:
    """A run with one checkpoint after step 4, and what a start of it finds."""

    folder: Path
    config: Config
    said: list[str] = field(default_factory=list)

    def save(self, accepted: Sequence[str] = (), hashes: Any = HASHES, config: Any = None) -> Path:
        state = {"step": 4, "config": config or self.config.model_dump(mode="json"), "fingerprints": hashes}
        weights = Snapshot({"w": torch.zeros(2)}, {})
        state |= {"accepted": list(accepted), "layout": {"threads": 1, "device": "A"}, "stream": None}
        return CheckpointFolder(self.folder, 2).save(4, weights, state)

    @staticmethod
    def num_steps(train: Any) -> int:
        """8 in an epoch, and one epoch if the config has neither."""
        return train.steps or round(8 * (train.epochs or 1))

    def find(
        self, config: Config | None = None, accept: Sequence[str] = (), hashes: Any = HASHES, **layout: Any
    ) -> Resume:
        said = io.StringIO()
        now = {"threads": 1, "device": "A", **layout}
        folder, progress = CheckpointFolder(self.folder, 2), Progress(console=Console(file=said, width=60))
        found = find_resume(folder, config or self.config, hashes, now, accept, progress, self.num_steps)
        self.said[:] = said.getvalue().splitlines()
        return found


@pytest.fixture
def run(make_config: Callable[..., Config], tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints", make_config("text"))


def changed(config: Config, section: str, **keys: Any) -> Config:
    data = config.model_dump(mode="json")
    data[section] |= keys
    return Config.model_validate(data)


def keys_of(faults: Sequence[str]) -> list[str]:
    return [fault.partition(": ")[0] for fault in faults]


def test_a_run_without_a_checkpoint_begins_at_the_beginning(run: Run) -> None:
    assert run.find() == Resume(checkpoint=None, step=0, accepted=(), evaluated=())
    assert run.said == []


def test_a_run_that_is_as_it_was_resumes(run: Run) -> None:
    saved = run.save(accepted=["step 2: train.seed: was 0 and is 1"])
    assert run.find() == Resume(saved, 4, ("step 2: train.seed: was 0 and is 1",))
    (line,) = run.said
    assert str(saved) in line


def test_a_broken_checkpoint_is_a_warning(run: Run) -> None:
    saved = run.save()
    broken = saved.with_name("step-000006")
    broken.mkdir()
    assert run.find().checkpoint == saved
    assert run.said[0].startswith(f"warning: {broken}: manifest.json cannot be read")


def test_every_change_of_the_result_is_named_with_the_remedy(run: Run) -> None:
    saved = run.save()
    config = changed(changed(run.config, "train", seed=3, max_grad_norm=None), "model", dtype="bfloat16")
    with pytest.raises(UserError) as refused:
        run.find(config)
    *faults, remedy = refused.value.faults
    values = [("model.dtype", "'float32'", "'bfloat16'"), ("train.max_grad_norm", "'1.0'", "not set")]
    for fault, (key, was, now) in zip(faults, [*values, ("train.seed", "'0'", "'3'")], strict=True):
        assert fault.startswith(f"{key}: ")
        assert 0 < fault.index(was) < fault.index(now)
    assert remedy.startswith(f"{saved}: ")
    for key in ("model.dtype", "train.max_grad_norm", "train.seed"):
        assert f"--accept-change {key}" in remedy
    assert "--fresh" in remedy


def test_a_key_that_is_new_or_gone_is_a_change(run: Run) -> None:
    run.save()
    with pytest.raises(UserError) as refused:
        run.find(hashes={"data.train.0.records": "aa", "data.train.images": "cc"})
    assert keys_of(refused.value.faults[:-1]) == ["data.train.images", "model.weights"]


@pytest.mark.parametrize(
    "key", ["data.train.0.records", "data.train.images", "model.weights", "model.processor", "model.template"]
)
def test_other_bytes_are_refused_without_their_hashes(key: str, run: Run) -> None:
    run.save()
    with pytest.raises(UserError) as refused:
        run.find(hashes=HASHES | {key: "cc"})
    (fault,) = refused.value.faults[:-1]
    assert fault.startswith(f"{key}: ")
    assert "the content has changed" in fault
    assert "cc" not in fault
    with pytest.raises(UserError, match=r"data\.train\.used: other samples are trained on \(max_samples, dedup, or"):
        run.find(hashes=HASHES | {"data.train.used": "cc"})


@pytest.mark.parametrize(
    ("keys", "accepting"),
    [
        (("a.b.c",), "--accept-change a.b.c"),
        (("a.b.c", "a.b.d", "a.b.e"), "--accept-change a.b.c --accept-change a.b.d --accept-change a.b.e"),
        (("a.b.c", "a.b.d", "a.b.e", "a.c"), "--accept-change a.b --accept-change a.c"),
    ],
)
def test_three_keys_are_accepted_by_name_and_more_by_section(keys: tuple[str, ...], accepting: str, run: Run) -> None:
    run.save()
    with pytest.raises(UserError) as refused:
        run.find(hashes=HASHES | dict.fromkeys(keys, "new"))
    assert refused.value.faults[-1].endswith(accepting)


def test_what_is_accepted_is_written_after_what_was_accepted_before(run: Run) -> None:
    saved = run.save(accepted=["earlier"])
    config = changed(run.config, "train", seed=3)
    with pytest.raises(UserError, match=r"model\.weights"):
        run.find(config, ["train.seed"], HASHES | {"model.weights": "cc"})
    found = run.find(config, ["train", "model.weights"], HASHES | {"model.weights": "cc"})
    assert (found.checkpoint, found.step) == (saved, 4)
    earlier, *lines = found.accepted
    assert (earlier, keys_of(lines)) == ("earlier", ["step 4", "step 4"])
    assert [line.split(": ")[1] for line in lines] == ["model.weights", "train.seed"]
    assert run.said[:2] == [f"accepted: {line}" for line in lines]


def test_what_was_moved_and_has_the_same_content_needs_no_word(run: Run) -> None:
    hashes = {"model.weights": "a", "model.processor": "b", "data.train.0.records": "c", "data.train.images": "d"}
    saved = run.save(hashes=hashes)
    moved = changed(changed(run.config, "model", path="/new/model"), "data", train=[{"path": "/new/data.jsonl"}])
    found = run.find(moved, hashes=hashes)
    assert (found.checkpoint, found.accepted) == (saved, ())
    assert " ".join(run.said[:-1]).count("moved: ") == 2
    assert run.said[0].startswith("moved: data.train.0.path: was '")
    assert run.said[0].endswith("and is '/new/data.jsonl', with the same content")
    with pytest.raises(UserError) as refused:
        run.find(moved, hashes=hashes | {"model.weights": "other"})
    assert keys_of(refused.value.faults[:-1]) == ["model.path", "model.weights"]
    with pytest.raises(UserError) as refused:
        run.find(moved, hashes={"model.weights": "a", "model.processor": "b"})
    assert "data.train.0.path" in keys_of(refused.value.faults)


def test_of_several_sources_none_may_be_moved_without_a_word(run: Run) -> None:
    """The images of two that change places have one fingerprint as before."""
    hashes = {"data.train.0.records": "c", "data.train.1.records": "c", "data.train.images": "d"}
    run.config = changed(run.config, "data", train=[{"path": "/a/data.jsonl"}, {"path": "/b/data.jsonl"}])
    run.save(hashes=hashes)
    swapped = changed(run.config, "data", train=[{"path": "/b/data.jsonl"}, {"path": "/a/data.jsonl"}])
    with pytest.raises(UserError) as refused:
        run.find(swapped, hashes=hashes)
    assert keys_of(refused.value.faults[:-1]) == ["data.train.0.path", "data.train.1.path"]


@pytest.mark.parametrize("accept", [["train.sed"], ["train.see"], ["trai"]])
def test_accepting_a_key_that_is_none_is_refused_before_anything_else(accept: list[str], run: Run) -> None:
    """A beginning of a name is not its section."""
    with pytest.raises(UserError, match=rf"--accept-change '?{accept[0]}'?: no such key") as refused:
        run.find(accept=accept)
    assert ("did you mean train.seed?" in str(refused.value)) == (accept[0] != "trai")


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        ("constant", "the rate is constant, so the result is that of 12 steps from the start"),
        # of 4 steps after the warmup one is done, of 10 steps two
        (
            "linear",
            "the rate was 7.50e-03 in step 4 and is 8.00e-03 in step 5, on the linear of 12 steps; 12 steps from the "
            "start would give another result",
        ),
    ],
)
def test_more_steps_extend_a_run_and_fewer_are_refused(
    schedule: str, line: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    run = Run(tmp_path / "checkpoints", make_config("text", steps=6, schedule=schedule, warmup_steps=2))
    saved = run.save()
    longer = changed(run.config, "train", steps=12)
    assert run.find(longer) == Resume(saved, 4, ("step 4: train.steps: was '6' and is '12'",))
    assert run.said == [f"extended from 6 to 12 steps: {line}", f"continuing from {saved}"]
    with pytest.raises(UserError, match=r"^train\.seed: was '0' and is '1', which changes the result"):
        run.find(changed(longer, "train", seed=1))
    with pytest.raises(UserError, match=r"^train\.steps: was '6' and is '5', which changes the result"):
        run.find(changed(run.config, "train", steps=5))


def test_more_epochs_extend_a_run(make_config: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints", make_config("text", epochs=1.5, schedule="constant"))
    run.save()
    found = run.find(changed(run.config, "train", epochs=2.0))
    assert found.accepted == ("step 4: train.epochs: was '1.5' and is '2.0'",)
    assert run.said[0].startswith("extended from 12 to 16 steps: ")


def test_a_key_that_the_config_lacks_changes_the_result(run: Run) -> None:
    state = run.config.model_dump(mode="json")
    state["train"]["lr"] = 3
    run.save(config=state)
    with pytest.raises(UserError, match=r"^train\.lr: was '3' and is not set, which changes the result"):
        run.find()


def test_what_evaluations_decide_may_not_change_with_early_stopping(run: Run) -> None:
    run.save()
    assert run.find(changed(run.config, "run", eval_every=7)).step == 4
    stopping = {"metric": "eval/perplexity", "patience": 2}
    run.config = changed(run.config, "train", early_stopping=stopping)
    run.save()
    with pytest.raises(UserError, match=r"^run\.eval_every: was '500' and is '7', which changes the result"):
        run.find(changed(run.config, "run", eval_every=7))


def test_other_evaluation_sets_change_no_result(run: Run) -> None:
    saved = run.save()
    source = {"path": run.config.data.train[0].path, "name": "held-out"}
    assert run.find(changed(run.config, "data", eval=[source])) == Resume(saved, 4)


def test_another_layout_is_reported_and_not_refused(run: Run) -> None:
    saved = run.save()
    assert run.find(threads=2) == Resume(saved, 4)
    said = run.said[-1]
    assert said.endswith("its bits may differ: threads 1 → 2")


def test_a_run_whose_dropout_was_made_otherwise_is_refused(make_config: Callable[..., Config], tmp_path: Path) -> None:
    lora = {"mode": "lora", "rank": 4, "alpha": 8.0}
    found = {}
    for dropout in (0.0, 0.1):
        config = make_config("text", {"language": {**lora, "dropout": dropout}})
        dataset = Dataset(config, load_processor(config.model.path), Progress(quiet=True))
        found[dropout] = fingerprints(config, dataset, lambda: None)
    assert found[0.1] == found[0.0] | {"tune.language.dropout.masks": "philox4x64-10"}
    run = Run(tmp_path / "checkpoints", config)
    run.save()  # of a version that did not name its masks
    hashes = HASHES | {"tune.language.dropout.masks": found[0.1]["tune.language.dropout.masks"]}
    with pytest.raises(UserError) as error:
        run.find(hashes=hashes)
    assert error.value.faults[0].startswith("tune.language.dropout.masks: was not set and is 'philox4x64-10'")
    assert run.find(hashes=hashes, accept=["tune.language.dropout"]).step == 4
