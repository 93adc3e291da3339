"""Files of features: read back whole or not at all, within their limits."""

import os
from pathlib import Path

import pytest
import torch

from mmtrain.dataset.image_inputs import Features
from mmtrain.model.image_cache.files import FeatureFolder
from mmtrain.model.image_cache.store import FeatureStore

KEY = "a" * 64


def features(number: int = 0, rows: int = 5) -> Features:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        "pooler_output.0": torch.randn(rows, 16, generator=generator),
        "deepstack_features.0.0": torch.randn(rows, 16, generator=generator).to(torch.bfloat16),
    }
    return Features(tensors, {"image_grid_thw": torch.tensor([[1, 4, number]])}, rows)


def folder(path: Path, limit: float = 1e9, model: str = "model") -> tuple[FeatureFolder, list[str]]:
    said: list[str] = []
    return FeatureFolder(path, model, limit, said.append), said


def total(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def age(path: Path, seconds: float) -> None:
    changed = path.stat().st_mtime - seconds
    os.utime(path, (changed, changed))


def assert_equal(found: Features | None, expected: Features) -> None:
    assert found is not None
    assert found.num_placeholders == expected.num_placeholders
    for own, other in ((found.tensors, expected.tensors), (found.inputs, expected.inputs)):
        assert own.keys() == other.keys()
        assert all(own[name].dtype == value.dtype and torch.equal(own[name], value) for name, value in other.items())


def test_what_is_written_is_read_by_another_process(tmp_path: Path) -> None:
    folder(tmp_path)[0].write(KEY, features())
    assert_equal(folder(tmp_path)[0].read(KEY), features())
    assert folder(tmp_path)[0].read("b" * 64) is None
    assert folder(tmp_path, model="other")[0].read(KEY) is None
    assert [path.name for path in (tmp_path / "model").iterdir()] == [f"{KEY}.safetensors"]


def test_no_flipped_bit_and_no_shortened_file_is_used(tmp_path: Path) -> None:
    """Everywhere in the file: what is read is what was written, or nothing, and then the file is gone."""
    own, _ = folder(tmp_path)
    own.write(KEY, features())
    path = tmp_path / "model" / f"{KEY}.safetensors"
    raw, refused = path.read_bytes(), 0
    flips = [raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :] for at in range(len(raw))]
    for broken in (*flips, *(raw[:at] for at in range(0, len(raw), 13)), b"", raw + b"\0"):
        path.write_bytes(broken)
        found = own.read(KEY)
        if found is None:
            refused += 1
            assert not path.exists()
        else:
            assert_equal(found, features())
    assert refused > 0.95 * (len(raw) + len(raw) / 13)  # the rest is white space after the header


def test_features_under_another_name_are_not_used(tmp_path: Path) -> None:
    own, _ = folder(tmp_path)
    own.write(KEY, features())
    (tmp_path / "model" / f"{KEY}.safetensors").rename(tmp_path / "model" / f"{'b' * 64}.safetensors")
    assert own.read("b" * 64) is None


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    old, _ = folder(tmp_path, model="old")
    for number in range(10):
        old.write(str(number), features(number))
        age(tmp_path / "old" / f"{number}.safetensors", 1000 - number)
    size, limit = total(tmp_path) / 10, total(tmp_path) * 1.2
    own, said = folder(tmp_path, limit)
    reader, _ = folder(tmp_path, limit, model="old")
    assert_equal(reader.read("0"), features(0))  # the oldest is used again
    for number in range(8):
        own.write(str(number), features(number))
        assert total(tmp_path) <= limit
    assert all(own.read(str(number)) is not None for number in range(8))
    assert reader.read("0") is not None
    assert reader.read("1") is None
    assert total(tmp_path) > limit - 4 * size
    assert not said


def test_what_this_run_uses_is_not_thrown_out_for_more(tmp_path: Path) -> None:
    """Every epoch needs all of them: by turns they would throw one another out and none would be found."""
    first, _ = folder(tmp_path / "measured")
    first.write(KEY, features())
    limit = total(tmp_path / "measured") * 4.5
    own, said = folder(tmp_path / "own", limit)
    for number in range(9):
        own.write(str(number), features(number))
    assert [number for number in range(9) if own.read(str(number)) is not None] == [0, 1, 2, 3]
    assert total(tmp_path / "own") <= limit
    assert len(said) == 1
    assert "run.image_cache.disk_gib" in said[0]


def test_several_writers_keep_the_limit_together(tmp_path: Path) -> None:
    first, _ = folder(tmp_path / "measured")
    first.write(KEY, features())
    size = total(tmp_path / "measured")
    writers = [folder(tmp_path / "own", 40 * size)[0] for _ in range(4)]
    for number in range(80):
        writers[number % 4].write(str(number), features(number))
    assert 36 * size <= total(tmp_path / "own") <= 42 * size


@pytest.mark.parametrize("on_disk", [False, True])
def test_memory_keeps_its_limit(on_disk: bool, tmp_path: Path) -> None:
    size = features().num_bytes
    assert size == 5 * 16 * 4 + 5 * 16 * 2 + 3 * 8
    store = FeatureStore(2.5 * size, folder(tmp_path)[0] if on_disk else None)
    for number in range(4):
        store.add(str(number), features(number))
        store.add(str(number), features(number))
    assert store.num_bytes == 2 * size
    found = [number for number in range(4) if store.find(str(number)) is not None]
    assert found == ([0, 1, 2, 3] if on_disk else [0, 1])
    assert store.num_bytes == 2 * size


def test_what_is_read_from_disk_is_then_in_memory(tmp_path: Path) -> None:
    folder(tmp_path)[0].write(KEY, features())
    store = FeatureStore(1e6, folder(tmp_path)[0])
    assert store.find(KEY) is not None
    (tmp_path / "model" / f"{KEY}.safetensors").unlink()
    assert_equal(store.find(KEY), features())
