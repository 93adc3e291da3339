"""Data sets of the hub in a local cache, and the files of one split."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mmtrain.config.data_section import Source
from mmtrain.errors import UserError
from mmtrain.records.data_files import find_data_files
from mmtrain.records.record_set import RecordSet
from test_containers import arrow, parquet


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf"


def rows(*questions: str) -> list[dict[str, Any]]:
    return [{"question": question, "answer": "A"} for question in questions]


def lines(*questions: str) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(*questions)).encode()


def downloaded(home: Path, name: str, files: dict[str, bytes]) -> Path:
    """As `hf download` leaves a data set: links in a snapshot to blobs next to it."""
    repo = home / "hub" / f"datasets--{name.replace('/', '--')}"
    revision = "0123456789012345678901234567890123456789"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "blobs").mkdir()
    for number, (path, content) in enumerate(files.items()):
        blob, link = repo / "blobs" / str(number), repo / "snapshots" / revision / path
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repo / "snapshots" / revision


def questions(path: str, split: str | None = None) -> list[str]:
    records = RecordSet([Source(path=path, split=split)])
    return [records.conversation(index).messages[0].text for index in range(len(records))]


def refusal(path: str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        RecordSet([Source(path=path, split=split)])
    (fault,) = caught.value.faults
    assert fault.isprintable()
    return fault


FILES = {
    "README.md": b"# Data",
    ".gitattributes": b"x",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002.parquet": parquet(rows("a", "b")),
    "data/train-00001-of-00002.parquet": parquet(rows("c")),
    "data/dev.jsonl": lines("d"),
}


def test_a_downloaded_data_set_is_read_by_its_id(home: Path) -> None:
    downloaded(home, "owner/name", FILES)
    assert questions("hub:owner/name", "train") == ["a", "b", "c"]
    assert questions("hub:owner/name", "validation") == ["d"]
    assert questions("hub:owner/name/data", "train") == ["a", "b", "c"]
    assert refusal("hub:owner/name") == (
        "hub:owner/name: it has the splits 'train', 'validation': set `split` to one of them"
    )
    assert refusal("hub:owner/name", "test").endswith(
        "no file of the split 'test': the names say 'train', 'validation'"
    )


def test_a_data_set_of_one_split_needs_no_name(home: Path) -> None:
    downloaded(home, "owner/name", {"train.jsonl": lines("a"), "README.md": b""})
    assert questions("hub:owner/name") == ["a"]


def test_a_data_set_that_the_library_prepared_is_read_by_its_id(home: Path) -> None:
    folder = home / "datasets" / "owner___name" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    (folder / "name-train-00000-of-00001.arrow").write_bytes(arrow("stream", rows("a", "b")))
    (folder / "name-test.arrow").write_bytes(arrow("stream", rows("c")))
    (folder / "dataset_info.json").write_text("{}")
    assert questions("hub:owner/name", "train") == ["a", "b"]
    assert questions("hub:owner/name", "test") == ["c"]
    other = folder.parent / "def"
    other.mkdir()
    (other / "name-train.arrow").write_bytes(arrow("stream", rows("z")))
    assert refusal("hub:owner/name", "train") == (
        f"hub:owner/name: `datasets` keeps several versions of it: name one of {folder}, {other} as the path"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hub:owner/name", "not in the local hub cache, and nothing is downloaded here: run `hf download"),
        ("hub:name", "expected hub:owner/name"),
        ("hub:", "expected hub:owner/name"),
        ("hub:../../etc/passwd", "not in the local hub cache"),
        ("hub:owner/name/../..", "expected hub:owner/name"),
        ("hub:owner/na\x1bme", "expected hub:owner/name"),
    ],
)
def test_what_is_not_in_the_cache_is_one_line(path: str, words: str) -> None:
    assert words in refusal(path)


def test_a_folder_of_a_data_set_must_be_there(home: Path) -> None:
    downloaded(home, "owner/name", {"en/train.jsonl": lines("a")})
    assert questions("hub:owner/name/en") == ["a"]
    assert refusal("hub:owner/name/de") == "hub:owner/name/de: its cached copy has no folder 'de'"


NAMES = {
    "train.jsonl": {"train"},
    "my-training_1.jsonl": {"train"},
    "trainer.jsonl": set(),
    "data/val/0.jsonl": {"validation"},
    "evaluation.jsonl": {"test"},
    "hard/0.jsonl": {"hard"},
}


def test_the_names_of_files_and_folders_say_their_split(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(lines(name))
    for split in ("train", "validation", "test", "hard"):
        found = {str(file.relative_to(tmp_path / "d")) for file in find_data_files(str(tmp_path / "d"), split)}
        assert found == {name for name, splits in NAMES.items() if split in splits}


def test_the_splits_that_save_to_disk_wrote(tmp_path: Path) -> None:
    for split, question in (("train", "a"), ("test", "b")):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "data-00000.arrow").write_bytes(arrow("stream", rows(question)))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000.arrow"}]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert questions(str(tmp_path), "train") == ["a"]
    assert questions(str(tmp_path), "test") == ["b"]
    assert refusal(str(tmp_path)) == f"{tmp_path}: it has several splits: set `split`, or name the folder of one"
