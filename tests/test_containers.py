"""Every container of records: the records, where each is, and what is refused."""

import csv
import gzip
import io
import json
import random
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmtrain.config.data_section import Source
from mmtrain.errors import UserError, grouped
from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text
from mmtrain.records.record_set import RecordSet
from mmtrain.records.sources import arrow as arrow_files
from mmtrain.records.sources.open import open_records

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"question": f"Q{i}", "answer": f'A{i}, "quoted"\nand on', "image": f"{i}.png"} for i in range(5)]
EXPECTED = [
    Conversation(
        (
            Message("user", (Image(f"{i}.png"), Text(f"Q{i}"))),
            Message("assistant", (Text(f'A{i}, "quoted"\nand on'),)),
        )
    )
    for i in range(5)
]


def png(colour: str) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(made, "PNG")
    return made.getvalue()


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return made.getvalue().encode()


def shard(members: list[tuple[str, bytes]]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def zst(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content))


def parquet(rows: list[dict[str, Any]] = ROWS) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    made = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), made, row_group_size=2)
    return made.getvalue()


def arrow(kind: str, rows: list[dict[str, Any]] = ROWS) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    found = pyarrow.Table.from_pylist(rows)
    made = io.BytesIO()
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(made, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return made.getvalue()


NAMES: list[str] = [f":{i}" for i in range(1, 6)]
NUMBERS: list[str] = [f"#{i}" for i in range(1, 6)]
CONTAINERS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "a.jsonl": (lines, NAMES),
    "a.JSONL": (lines, NAMES),
    "a.ndjson": (lines, NAMES),
    "a.jsonl.gz": (lambda: gzip.compress(lines()), NAMES),
    "a.jsonl.zst": (lambda: zst(lines()), NAMES),
    "a.json": (lambda: json.dumps(ROWS, indent=1).encode(), [":2", ":7", ":12", ":17", ":22"]),
    "a.json.gz": (lambda: gzip.compress(json.dumps(ROWS, indent=1).encode()), [":2", ":7", ":12", ":17", ":22"]),
    "list.jsonl": (lambda: json.dumps(ROWS, indent=1).encode(), [":2", ":7", ":12", ":17", ":22"]),
    "one line.jsonl": (lambda: json.dumps(ROWS).encode(), [f":1 item {i}" for i in range(1, 6)]),
    "a.csv": (lambda: table(","), [":2", ":4", ":6", ":8", ":10"]),
    "a.tsv": (lambda: b"\xef\xbb\xbf" + table("\t"), [":2", ":4", ":6", ":8", ":10"]),
    "a.csv.gz": (lambda: gzip.compress(table(",")), [":2", ":4", ":6", ":8", ":10"]),
    "a.parquet": (parquet, NUMBERS),
    "stream.arrow": (lambda: arrow("stream"), NUMBERS),
    "file.arrow": (lambda: arrow("file"), NUMBERS),
    "a.tar": (
        lambda: shard([(f"en/{i}.json", json.dumps(row).encode()) for i, row in enumerate(ROWS)]),
        [f"#en/{i}" for i in range(5)],
    ),
}


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_records_come_from_every_container(tmp_path: Path, name: str) -> None:
    make, places = CONTAINERS[name]
    path = write(tmp_path / name, make())
    records = RecordSet([Source(path=path)])
    assert len(records) == 5
    order = [3, 0, 4, 4, 1, 2]
    assert [records.conversation(index) for index in order] == [EXPECTED[index] for index in order]
    assert [str(records.place(index)) for index in range(5)] == [path + place for place in places]
    assert records.conversation(0).shape == "question"


def test_a_folder_can_mix_them(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines())
    write(tmp_path / "b" / "c.csv.gz", gzip.compress(table(",")))
    write(tmp_path / "b" / "d.tar", CONTAINERS["a.tar"][0]())
    records = RecordSet([Source(path=str(tmp_path))])
    assert [records.conversation(index) for index in range(15)] == EXPECTED * 3


def faults_of(path: Path | str) -> list[str]:
    with pytest.raises(UserError) as caught:
        open_records(str(path))
    assert all(fault.isprintable() for fault in caught.value.faults)
    return caught.value.faults


def refusal(path: str, index: int = 0) -> str:
    (file,) = open_records(path)
    with pytest.raises(SampleError) as caught:
        file.record(index)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- tables of text ---


def test_a_table_leaves_empty_fields_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"system,question,answer,image\n,Q,A,\nS,Q,A,\n")
    records = RecordSet([Source(path=path)])
    assert [message.role for message in records.conversation(0).messages] == ["user", "assistant"]
    assert [message.text for message in records.conversation(1).messages] == ["S", "Q", "A"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2,3\n", "3 fields, expected 2 as in the first row"),
        (b"a,b\n1\n", "1 fields, expected 2"),
        (b"a,b\n\xff,2\n", "not UTF-8"),
        (b'a,b\n1,"2\n3,4\n', "not a row of a table: unexpected end of data"),
        (b'a,b\n"1"x,2\n', "not a row of a table"),
    ],
)
def test_a_broken_row_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("content", [b"a,a\n1,2\n", b"a,\n1,2\n", b"\xff,b\n1,2\n"])
def test_a_table_whose_first_row_does_not_name_its_columns_is_refused(tmp_path: Path, content: bytes) -> None:
    (fault,) = faults_of(write(tmp_path / "a.csv", content))
    assert fault.startswith(f"{tmp_path}/a.csv:1: ")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("alpaca.csv", [["00000", "11111\n22222", "3.3"], ["aaaaa", "ccccc"], ["AAAAA\nBBBBB", "CCCCC"]]),
        ("alpaca2.csv", [["11111", "33333"], ["aaaaa", "ccccc"], ["AAAAA", "CCCCC"]]),
        ("swift_single.csv", [["00000", "11111", "22222"], ["aaaaa", "bbbbb"], ["AAAAA", "BBBBB"]]),
    ],
)
def test_a_published_table_is_read(file: str, expected: list[list[str]]) -> None:
    records = RecordSet([Source(path=str(SHARED / "chat_demos/ms_swift_tests" / file))])
    found = [records.conversation(index) for index in range(len(records))]
    assert [[message.text for message in one.messages] for one in found] == expected


# --- compressed ---


@pytest.mark.parametrize("content", [gzip.compress(lines(), mtime=0)[:-9], b"not gzip", b"\x1f\x8b" + b"x" * 40])
def test_a_broken_gzip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (fault,) = faults_of(write(tmp_path / "a.jsonl.gz", content))
    assert fault.startswith(f"{tmp_path}/a.jsonl.gz: not a whole .gz file: ")


def test_a_zstd_file_of_several_frames_is_read_whole_and_one_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    content = zst(lines(ROWS[:2])) + zst(lines(ROWS[2:]))
    records = RecordSet([Source(path=write(tmp_path / "a.jsonl.zst", content))])
    assert [records.conversation(index) for index in range(len(records))] == EXPECTED
    (fault,) = faults_of(write(tmp_path / "b.jsonl.zst", content[:-5]))
    assert fault == f"{tmp_path}/b.jsonl.zst: not a whole .zst file: it is cut off"


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "mmtrain[parquet]"), ("a.arrow", "pyarrow")):
        (fault,) = faults_of(write(tmp_path / name, b"x"))
        assert fault.startswith(f"{tmp_path}/{name}: reading ")
        assert package in fault


# --- parquet, Arrow ---


@pytest.mark.parametrize(("room", "num_read"), [(2**28, 16), (1, None)])
def test_rows_of_a_parquet_file_are_read_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, num_read: int | None
) -> None:
    """In any order, also where nothing stays in memory; in order, or where there is room, each batch is read once."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(100)]}), path, row_group_size=50)
    recent = arrow_files._Recent(room)
    monkeypatch.setattr(arrow_files, "_BATCHES", recent)
    monkeypatch.setattr(arrow_files, "_MAX_ROWS", 7)
    read: list[int] = []
    file = arrow_files.ParquetFile(path)
    monkeypatch.setattr(file, "_file", CountingFile(file._file, read))
    assert [file.record(i) for i in range(100)] == [{"text": f"row {i}"} for i in range(100)]
    assert len(read) == 16  # of 7 rows, eight in each row group
    mixed = random.Random(0).sample(range(100), 100)
    assert [file.record(i) for i in mixed] == [{"text": f"row {i}"} for i in mixed]
    assert num_read in (None, len(read))
    assert room > 1 or len(recent._found) == 1
    recent.limit(1)
    assert [file.record(i) for i in (1, 99)] == [{"text": "row 1"}, {"text": "row 99"}]
    assert len(recent._found) == 1


class CountingFile:
    """A parquet file that lists the batches that are read of it."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self._file, self._read = file, read

    def iter_batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in self._file.iter_batches(*args, **kwargs):
            self._read.append(len(batch))
            yield batch


def test_images_of_a_parquet_file_are_bytes(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], "images": images}
        for images in ([{"bytes": png("red"), "path": None}], [{"bytes": png("blue"), "path": "b.png"}])
    ]
    records = RecordSet([Source(path=write(tmp_path / "a.parquet", parquet(rows)))])
    assert records.conversation(0).images == (Image("bytes", png("red")),)
    assert records.conversation(1).images == (Image("b.png", png("blue")),)


def saved(folder: Path, state: dict[str, Any]) -> None:
    write(folder / "data-00001.arrow", arrow("stream", ROWS[2:]))
    write(folder / "data-00000.arrow", arrow("stream", ROWS[:2]))
    write(folder / "dataset_info.json", b"{}")
    write(folder / "state.json", json.dumps(state).encode())


STATE = {"_data_files": [{"filename": "data-00000.arrow"}, {"filename": "data-00001.arrow"}], "_split": "train"}


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    saved(tmp_path / "train", STATE)
    for path in (tmp_path / "train", tmp_path):
        records = RecordSet([Source(path=str(path))])
        assert [records.conversation(index) for index in range(5)] == EXPECTED
    assert str(records.place(3)) == f"{tmp_path}/train/data-00001.arrow#2"


def test_a_data_set_saved_to_disk_that_cannot_be_read_as_it_is_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "train", {**STATE, "_indices_files": [{"filename": "indices.arrow"}]})
    assert "flatten_indices()" in faults_of(tmp_path)[0]
    write(tmp_path / "train" / "state.json", b"{}")
    assert "not the state of a data set" in faults_of(tmp_path)[0]
    write(tmp_path / "dataset_dict.json", b'{"splits": ["train"]}')
    assert faults_of(tmp_path) == [f"{tmp_path}: it has several splits: set `split`, or name the folder of one"]


# --- shards ---


def test_the_members_of_a_key_are_one_sample(tmp_path: Path) -> None:
    question = {"question": "Q", "answer": "A"}
    members = [
        ("0.json", json.dumps(question).encode()),
        ("0.png", png("red")),
        ("1.left.jpg", png("green")),
        ("1.right.JPG", png("blue")),
        ("1.json", json.dumps({**question, "images": ["1.right.JPG", "x/1.left.jpg"]}).encode()),
        ("2.json", json.dumps({**question, "image": "elsewhere.png"}).encode()),
        ("3.json", json.dumps(question).encode()),
    ]
    path = write(tmp_path / "a.tar", shard(members))
    records = RecordSet([Source(path=path)])
    assert [records.conversation(index).images for index in range(4)] == [
        (Image("0.png", png("red")),),
        (Image("1.right.JPG", png("blue")), Image("1.left.jpg", png("green"))),
        (Image("elsewhere.png"),),
        (),
    ]
    assert [str(records.place(index)) for index in range(4)] == [f"{path}#{index}" for index in range(4)]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.png", b"x")], "expected one .json member of the key, or one .txt, found '0.png'"),
        ([("0.json", b"{}"), ("0.a.json", b"{}")], "or one .txt, found '0.json', '0.a.json'"),
        ([("0.json", b"{}"), ("0.mp4", b"x")], "the member '0.mp4' is neither the record nor an image"),
        ([("0.json", b"{}"), ("0.cls", b"x")], "the member '0.cls' is neither the record nor an image"),
        ([("0.json", b'{"image": "b.png"}'), ("0.png", b"x")], "does not name the member '0.png'"),
        ([("0.json", b"{")], "not JSON"),
        ([("0.json", b"{}"), ("0.json", b"{}")], "two members have the same name: '0.json'"),
        ([("data.jsonl", b"{}")], "take the table out of the shard, and set `root` of the source to the shard"),
    ],
)
def test_a_sample_of_a_shard_that_would_lose_something_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    assert words in refusal(write(tmp_path / "a.tar", shard(members)))


def test_a_shard_whose_keys_are_in_pieces_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", shard([("0.json", b"{}"), ("1.json", b"{}"), ("0.png", b"x"), ("1.png", b"x")]))
    with pytest.raises(UserError, match="the members of the key '0' are not next to each other"):
        open_records(str(path))


def test_a_broken_shard_is_refused_and_names_the_last_whole_member(tmp_path: Path) -> None:
    content = shard([("0.json", b"{}"), ("1.json", b"{}")])
    broken = bytearray(content)
    broken[1024:1100] = b"x" * 76
    assert "the tar file is broken after the member '0.json'" in faults_of(write(tmp_path / "a.tar", bytes(broken)))[0]
    assert "not a plain tar file" in faults_of(write(tmp_path / "b.tar", gzip.compress(content)))[0]
    assert "not a plain tar file: unexpected end of data" in faults_of(write(tmp_path / "c.tar", content[:1536]))[0]


def test_many_faults_of_a_table_are_one_line() -> None:
    faults = [f"data/a.parquet#{row}: {row} tokens, over the 5 allowed" for row in range(11, 161)]
    assert grouped(faults) == ["data/a.parquet#160 (and 149 more rows: 11, 12, 13 …): 160 tokens, over the 5 allowed"]


# --- broken files ---


def mutated(content: bytes, random_: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(made))
        kind = random_.randrange(3)
        if kind == 0:
            made[at] = random_.randrange(256)
        elif kind == 1:
            del made[at : at + random_.randint(1, 40)]
        else:
            made[at:at] = random_.randbytes(random_.randint(1, 9))
        if not made:
            break
    return bytes(made)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_mutated_file_gives_records_or_plain_refusals(tmp_path: Path, name: str) -> None:
    content = CONTAINERS[name][0]()
    seen: set[str] = set()
    faults: list[str] = []
    for seed in range(60 if name != "stream.arrow" else 300):  # a row of broken Arrow can end the process
        path = write(tmp_path / name, mutated(content, random.Random(seed)))
        try:
            records = RecordSet([Source(path=path)])
        except UserError as error:
            seen.add("file")
            faults += [fault.removeprefix(path) for fault in error.faults]
            continue
        for index in range(len(records)):
            assert str(records.place(index)).startswith(path)
            try:
                records.conversation(index)
                seen.add("record")
            except SampleError as error:
                seen.add("refusal")
                faults.append(f": {error}")
    assert seen - {"record"}
    assert [fault for fault in faults if not (fault.isprintable() and fault.startswith(":"))] == []
