"""Checkpoints: written whole, read back to the bit, and every fault found and named."""

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmtrain import atomic_files
from mmtrain.errors import NoCheckpointError, StorageError, UserError
from mmtrain.train import checkpoint
from mmtrain.train.checkpoint import CheckpointFolder, Snapshot, checkpoint_bytes, read_state, restore, snapshot


@dataclass
class Usage:
    """Of a disk."""

    free: int


STATE = {"step": 5, "accepted": []}


def model_of(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers, the first one frozen."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(3, width) for width in widths))
    model[0].requires_grad_(False)
    return model


def stepped(model: nn.Module) -> torch.optim.AdamW:
    """An optimizer that has made two steps with all but the last parameter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        for parameter in list(model.parameters())[:-1]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    return snapshot(model, optimizer, lambda value: value, lambda: None)


@pytest.fixture
def small() -> Snapshot:
    return Snapshot({"w": torch.arange(4.0)}, {"w|exp_avg": torch.ones(4)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_holds_what_is_trainable_and_its_moments_and_nothing_else() -> None:
    model = model_of(2, 4)
    optimizer = stepped(model)
    ticks: list[int] = []
    found = snapshot(model, optimizer, lambda value: 2 * value, lambda: ticks.append(1))
    assert list(found.weights) == ["1.weight", "1.bias"]
    assert torch.equal(found.weights["1.weight"], 2 * model.get_parameter("1.weight"))
    assert sorted(found.moments) == ["1.weight|exp_avg", "1.weight|exp_avg_sq", "1.weight|step"]
    assert torch.equal(
        found.moments["1.weight|exp_avg"], 2 * optimizer.state[model.get_parameter("1.weight")]["exp_avg"]
    )
    assert len(ticks) == 5  # once for each tensor, so that a slow gathering is no hanging one
    assert not any(value.requires_grad for value in found.weights.values())


def test_the_size_of_a_checkpoint_is_that_of_float32_weights_and_two_moments() -> None:
    assert checkpoint_bytes(model_of(2, 4).half()) == 3 * 4 * (3 * 4 + 4)


def test_a_restored_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    model = model_of(2, 4)
    optimizer = stepped(model)
    folder = tmp_path / "run" / "checkpoints"
    saved = CheckpointFolder(folder, 2).save(5, taken(model, optimizer), STATE)
    assert saved == folder / "step-000005"
    assert read_state(saved) == STATE

    other = model_of(2, 4, seed=1)
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1)
    shares: list[Tensor] = []

    def share(value: Tensor, parameter: Tensor) -> Tensor:
        shares.append(parameter)
        return value

    restore(saved, other, again, share)
    assert (
        len(shares) == 4
    )  # two weights, and two moments of one of them; the step, a single number, is every process's
    assert {id(value) for value in shares} == {id(value) for value in other[1].parameters()}
    assert not again.state[other.get_parameter("1.bias")]
    for own, taker in ((model, optimizer), (other, again)):
        torch.manual_seed(3)
        for parameter in own[1].parameters():
            parameter.grad = torch.randn_like(parameter)
        taker.step()
    for name in ("1.weight", "1.bias"):
        assert torch.equal(model.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (model_of(2, 5), r"2 weights differ from the model's, such as '1.bias' \(\(4,\) there, \(5,\) now\)"),
        (model_of(2, 4, 4), r"2 weights .*such as '2.bias' \(none there, \(4,\) now\)"),
        (model_of(2), r"2 weights .*such as '1.bias' \(\(4,\) there, none now\)"),
    ],
    ids=["shape", "more", "fewer"],
)
def test_a_checkpoint_of_other_weights_is_refused(other: nn.Module, reason: str, tmp_path: Path) -> None:
    model = model_of(2, 4)
    saved = CheckpointFolder(tmp_path, 2).save(5, taken(model, stepped(model)), STATE)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    with pytest.raises(UserError, match=reason):
        restore(saved, other, optimizer, lambda value, parameter: value)


def test_the_newest_few_are_kept_and_those_after_the_step_deleted(tmp_path: Path, small: Snapshot) -> None:
    """Those after it were broken: the run has computed these steps again."""
    folder = CheckpointFolder(tmp_path, 2)
    assert folder.newest() == (None, [])
    for step in (2, 4, 999_999, 1_000_002):
        folder.save(step, small, {"step": step})
    assert names(tmp_path) == ["step-1000002", "step-999999"]
    assert folder.newest() == (tmp_path / "step-1000002", [])
    (tmp_path / "step-mine").mkdir()
    folder.save(6, small, STATE)
    folder.save(8, small, STATE)
    assert names(tmp_path) == ["step-000006", "step-000008"]
    folder.save(8, small, {"step": "again"})
    assert names(tmp_path) == ["step-000006", "step-000008"]
    assert read_state(tmp_path / "step-000008") == {"step": "again"}


def test_the_best_one_is_kept_besides_the_newest(tmp_path: Path, small: Snapshot) -> None:
    folder = CheckpointFolder(tmp_path, 2, keeps_best=True)
    for step in (2, 4, 6, 8):
        folder.save(step, small, STATE, best=2)
    assert names(tmp_path) == ["step-000002", "step-000006", "step-000008"]
    assert folder.steps() == (8, 6, 2)
    assert folder.at(2) == tmp_path / "step-000002"
    spoil(tmp_path / "step-000002", "byte")
    with pytest.raises(NoCheckpointError, match=r"step-000002: optimizer\.safetensors is not what was written"):
        folder.at(2)
    folder.save(10, small, STATE, best=8)
    assert folder.steps() == (10, 8)


def spoil(path: Path, how: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    if how == "byte":
        data = bytearray((path / "optimizer.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "optimizer.safetensors").write_bytes(bytes(data))
    elif how == "missing":
        (path / "state.json").unlink()
    elif how == "unlisted":
        del manifest["sha256"]["trainable.safetensors"]
    elif how == "other step":
        manifest["step"] = 3
    if how in ("unlisted", "other step"):
        (path / "manifest.json").write_text(json.dumps(manifest))
    if how in ("[]", "{", '{"sha256": []}', "{}", "null"):
        (path / "manifest.json").write_text(how)


FAULTS = {
    "byte": "optimizer.safetensors is not what was written",
    "missing": "state.json cannot be read (No such file or directory)",
    "unlisted": "manifest.json is not what was written",
    "other step": "manifest.json is not what was written",
    "[]": "manifest.json cannot be read (",
    "{": "manifest.json cannot be read (",
    "{}": "manifest.json cannot be read (",
    "null": "manifest.json cannot be read (",
    '{"sha256": []}': "manifest.json cannot be read (",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_broken_checkpoint_is_named_with_what_is_wrong_and_the_one_before_used(
    how: str, tmp_path: Path, small: Snapshot
) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    first, second = folder.save(2, small, STATE), folder.save(4, small, STATE)
    spoil(second, how)
    found, lines = folder.newest()
    assert found == first
    (line,) = lines
    assert line.startswith(f"{second}: {FAULTS[how]}")
    assert line.endswith("; step-000002 is used")
    spoil(first, how)
    with pytest.raises(NoCheckpointError) as refused:
        folder.newest()
    assert [fault.partition(": ")[0] for fault in refused.value.faults] == [str(second), str(first), str(tmp_path)]
    assert "--fresh" in refused.value.faults[-1]


def test_what_a_killed_run_was_writing_is_swept(tmp_path: Path, small: Snapshot) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    for name in (".step-000004.new", ".step-000002.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("half")
    folder.save(4, small, STATE)
    assert names(tmp_path) == ["step-000004"]
    assert names(tmp_path / "step-000004") == [
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "trainable.safetensors",
    ]


@pytest.mark.parametrize("number", [28, 122])
def test_a_checkpoint_that_cannot_be_written_leaves_those_before(
    number: int, tmp_path: Path, small: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors gives the system's error as text: 28 is no space, 122 a quota."""
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(2, small, STATE)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: it failed (os error {number})")

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(3_500_000_000 if path == tmp_path else 0))
    large = Snapshot({"w": torch.zeros(1, dtype=torch.int8).expand(500_000_000)}, small.moments)
    with pytest.raises(StorageError, match=r"step-000004: the checkpoint needs 500\.0 MB, 3,500\.0 MB are free"):
        folder.save(4, large, STATE)
    assert names(tmp_path) == ["step-000002"]
    assert folder.newest() == (tmp_path / "step-000002", [])


def test_a_folder_that_cannot_be_made_or_cleaned_is_named(
    tmp_path: Path, small: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", 1)
    folder.save(2, small, STATE)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(CheckpointFolder, "_remove", refuse)
    with pytest.raises(StorageError, match=r"/checkpoints: step-000004 is saved, an older one cannot be deleted: Perm"):
        folder.save(4, small, STATE)
    assert folder.newest()[0] == tmp_path / "checkpoints" / "step-000004"
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"/checkpoints: it cannot be made: Permission denied; allow writing there"):
        folder.check_room(1)


def test_another_error_of_safetensors_is_raised_as_it_is(
    tmp_path: Path, small: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tensors: Any, path: Path) -> None:
        raise SafetensorError("no such type")

    monkeypatch.setattr(checkpoint, "save_file", wrong)
    with pytest.raises(SafetensorError, match="no such type"):
        CheckpointFolder(tmp_path, 1).save(4, small, STATE)


def test_a_disk_that_does_not_keep_what_was_written_is_noticed_and_the_one_before_stays(
    tmp_path: Path, small: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(2, small, STATE)
    move = atomic_files._move_into_place

    def lossy(target: Path, made: Path, durable: bool) -> None:
        move(target, made, durable)
        spoil(target, "byte")

    monkeypatch.setattr(atomic_files, "_move_into_place", lossy)
    with pytest.raises(StorageError, match=r"step-000004: read back, optimizer\.safetensors is not what was"):
        folder.save(4, small, STATE)
    assert folder.newest()[0] == tmp_path / "step-000002"


def test_room_is_needed_for_those_to_be_kept_and_one_more(
    tmp_path: Path, small: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 of 1 GB, and one more where the best is kept; then 3 of 1 MB, less what lies there already."""
    place, used = tmp_path / "run" / "checkpoints", 500_000
    folder = CheckpointFolder(place, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(3_000_000_000 if path == place else 0))
    folder.check_room(1_000_000_000)
    with pytest.raises(StorageError, match=r"2 checkpoints and one .* need 3,300\.0 MB more, 3,000\.0 MB are free"):
        folder.check_room(1_100_000_000)
    with pytest.raises(StorageError, match=r"^\S+/run/checkpoints: 3 checkpoints and one .* need 4,000\.0 MB more"):
        CheckpointFolder(place, 2, keeps_best=True).check_room(1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(3_000_000 - used))
    (place / "step-000002").mkdir()
    (place / ".step-000004.new").mkdir()
    (place / ".step-000004.new" / "left").write_bytes(bytes(10**6))
    (place / "step-000002" / "state.json").write_bytes(bytes(used - 10_000))
    with pytest.raises(StorageError, match=r"need 2\.5 MB more"):
        folder.check_room(1_000_000)
    (place / "step-000002" / "state.json").write_bytes(bytes(used + 10_000))
    folder.check_room(1_000_000)
    assert names(place) == ["step-000002"]
