"""A path names files of records: nothing in a folder is left out silently, and only regular files are opened."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.data_files import find_data_files
from mmtrain.records.json_text import MAX_RECORD
from mmtrain.records.sources.open import open_records
from mmtrain.regular_files import open_regular


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A read that hangs fails its test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def faults_of(path: Path | str) -> list[str]:
    with pytest.raises(UserError) as caught:
        open_records(str(path))
    assert all(fault.isprintable() for fault in caught.value.faults)
    return caught.value.faults


def make(folder: Path, *names: str, content: bytes = b"[1]") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


PLAIN = ["README.md", "LICENSE", "LICENSE-flag-icons", "NOTICE", "readme", "answers.txt", "a.png", "b.JPG", ".hidden"]
PLAIN += [".cache/x.parquet", "images/a.png", "images/deeper/b.jpg", "images/LICENSE", "prepare.py", "._a.jsonl"]
LEFT_OUT = ["a.jsonl.bz2", "b.tar.gz", "c.xlsx", "d.pickle", "g.jsonl.bak", "part-00000", "h.zip", "deep/er/i.zip"]
READ = [
    "a.parquet",
    "b.jsonl.gz",
    "c.csv",
    "d.tsv",
    "e.ndjson",
    "f.arrow",
    "g.tar",
    "h.json.zst",
    "i.jsonlines",
    "J.CSV",
]
DEEPER = ["en/train.jsonl", "en/deep/er/train.JSON", "shards/0.parquet", "more/0.jsonl.gz", "csv/a.csv"]


def test_what_is_plainly_not_data_may_be_next_to_it(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.json", *PLAIN)
    assert [file.name for file in find_data_files(str(tmp_path))] == ["a.json", "b.jsonl"]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_another_file_in_a_data_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make(tmp_path, "a.jsonl", name)
    (fault,) = faults_of(tmp_path)
    assert fault.startswith(f"{tmp_path}/{name}: not a file of records that is read: move it away")
    assert f"{tmp_path}/*.jsonl" in fault
    assert [file.name for file in find_data_files(f"{tmp_path}/*.jsonl")] == ["a.jsonl"]


@pytest.mark.parametrize("name", [*READ, *DEEPER])
def test_a_folder_is_read_with_its_subfolders(tmp_path: Path, name: str) -> None:
    make(tmp_path, "0.jsonl", name, "zz/9.jsonl")
    assert {str(file.relative_to(tmp_path)) for file in find_data_files(str(tmp_path))} == {
        "0.jsonl",
        name,
        "zz/9.jsonl",
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dataset_info.json", "it describes data sets: give a file of records that it names"),
        ("cat.jpg", "docs/data.md says how to write one for images"),
    ],
)
def test_a_file_that_is_plainly_no_data_says_what_to_give(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text('{"my_data": {"file_name": "my.json"}}')
    with pytest.raises(UserError, match=f"{name}: not a file of records: {words}"):
        find_data_files(str(tmp_path / name))


def test_a_link_to_a_folder_is_not_followed_and_not_left_out(tmp_path: Path) -> None:
    make(tmp_path, "data/a.jsonl", "other/b.jsonl", "images/c.png")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "images")
    assert [file.name for file in find_data_files(f"{tmp_path}/data")] == ["a.jsonl"]
    (tmp_path / "data" / "other").symlink_to(tmp_path / "other")
    assert "a link to a folder with files of records" in faults_of(tmp_path / "data")[0]


def test_all_that_would_be_left_out_is_named_at_once(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.bak", "c.xlsx", "d/e.zip")
    assert len(faults_of(tmp_path)) == 3


def test_an_ending_in_capitals_is_read(tmp_path: Path) -> None:
    make(tmp_path, "A.JSONL", content=b"1\n2\n")
    make(tmp_path, "B.Json")
    assert [len(file) for file in open_records(str(tmp_path))] == [2, 1]
    assert len(open_records(f"{tmp_path}/A.JSONL")[0]) == 2


def test_a_missing_relative_path_names_the_folder_that_was_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) in faults_of("train.jsonl")[0]


# --- other things than files ---


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_only_regular_files_are_read(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"fifo.{suffix}")
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder.{suffix}").symlink_to("/tmp")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / f"socket.{suffix}"))
    for name in ("fifo", "zero", "socket"):
        for path in (tmp_path / f"{name}.{suffix}", f"{tmp_path}/{name}.*"):
            (fault,) = faults_of(path)
            assert fault.startswith(f"{tmp_path}/{name}.{suffix}: cannot be read: ")
    make(tmp_path, f"file.{suffix}")
    (tmp_path / f"link.{suffix}").symlink_to(f"file.{suffix}")
    assert len(open_records(f"{tmp_path}/link.{suffix}")[0]) == 1


def test_a_link_to_nothing_is_not_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        assert faults_of(path) == [f"{tmp_path}/b.jsonl: cannot be read: No such file or directory"]


def test_a_folder_is_reported_as_one(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1b[31mb", b"\xff\xfe", "\u2028".encode()])
@pytest.mark.parametrize("content", [b"", b"7", b"[1", b"\xff", b"[1]]"])
def test_a_strange_file_name_is_reported_on_one_printable_line(tmp_path: Path, name: bytes, content: bytes) -> None:
    path = tmp_path / os.fsdecode(name + b".json")
    path.write_bytes(content)
    (fault,) = faults_of(path)
    fault.encode()
    (tmp_path / os.fsdecode(name + b".zip")).write_bytes(b"")
    assert len(faults_of(tmp_path)) == 1
    assert "there is no file of records" in faults_of(tmp_path / os.fsdecode(name))[0]


# --- long records ---


def test_a_line_that_is_too_long_is_refused_and_leaves_the_others(tmp_path: Path) -> None:
    text = b"x" * (MAX_RECORD - 2)
    lines = [
        b"1",
        b'"' + text + b'"',
        b'"' + text + b'x"',
        b"",
        b" " * (MAX_RECORD + 9),
        b" " * MAX_RECORD + b"7",
        b"2",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (file,) = open_records(f"{tmp_path}/a.jsonl")
    assert [file.place(i).line for i in range(len(file))] == [1, 2, 3, 6, 7]
    assert (file.record(0), len(file.record(1)), file.record(4)) == (1, MAX_RECORD - 2, 2)
    for index in (2, 3):
        with pytest.raises(SampleError, match=rf"a record of [\d,]+ bytes, over the {MAX_RECORD:,} allowed: split it"):
            file.record(index)


def test_an_item_of_a_list_that_is_too_long_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[1,\n"' + b"x" * MAX_RECORD + b'"]')
    (fault,) = faults_of(tmp_path / "a.json")
    assert fault.startswith(f"{tmp_path}/a.json:2: a record of {MAX_RECORD + 2:,} bytes, over the {MAX_RECORD:,}")


def test_a_file_that_vanishes_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (file,) = open_records(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SampleError, match="No such file"):
        file.record(0)
